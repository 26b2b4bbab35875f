"""API keys: a file that only its owner reads. Keys are kept and compared as hashes, in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from rlsys.errors import ConfigError

LOCAL = "local"  # tenant of a server without keys
PREFIX = "tml-"  # clients refuse other keys before they send them
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # also the name of the tenant's folder
_KEY = re.compile(r"[!-~]{8,256}")


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    tenant: str


class KeyFile:
    """Keys of a file with one `key tenant` per line; a changed file takes effect with the next request.

    Raises:
        ConfigError: the file is readable by others, or a line has another form. The message holds no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._entries: tuple[_Entry, ...] = ()
        self._refresh()

    def tenant(self, key: str) -> str | None:
        """The key's tenant. Takes the same time for any key."""
        self._refresh()
        digest = _digest(key)
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.tenant
        return found

    @property
    def tenants(self) -> list[str]:
        return sorted({entry.tenant for entry in self._entries})

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
        except OSError as error:
            raise ConfigError(f"keys: {self._path}: cannot be read: {error.strerror}") from None
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp == self._stamp:
            return
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigError(
                f"keys: {self._path}: has mode {stat.S_IMODE(found.st_mode):04o}, so others can read it; "
                "wanted 0600 (chmod 600)"
            )
        self._entries = _entries(self._path)
        self._stamp = stamp


class NoKeys:
    """Any non-empty key belongs to one tenant. A page in the user's browser cannot send the header."""

    tenants = (LOCAL,)

    def tenant(self, key: str) -> str | None:
        return LOCAL if key else None


Keys = KeyFile | NoKeys


def create_key_file(path: Path, tenant: str = LOCAL) -> None:
    """Write a file with one new key, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{PREFIX}{secrets.token_hex(24)} {tenant}\n")


def _entries(path: Path) -> tuple[_Entry, ...]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = line.split()
        if len(words) != 2 or not _KEY.fullmatch(words[0]) or not _TENANT.fullmatch(words[1]):
            raise ConfigError(
                f"keys: {path}: line {number}: wanted `key tenant`: a key of 8 to 256 printable characters, and a "
                "tenant of 1 to 64 letters, digits, '_' and '-'"
            )
        found.append(_Entry(_digest(words[0]), words[1]))
    if not found:
        raise ConfigError(f"keys: {path}: has no key; wanted at least one line `key tenant`")
    return tuple(found)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).digest()
