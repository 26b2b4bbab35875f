"""API keys: of a file that only its owner reads, or of an environment variable.

Keys are kept and compared as hashes, in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from rlsys.errors import ConfigError

LOCAL = "local"  # tenant of a server without keys
PREFIX = "tml-"  # clients refuse other keys before they send them
VARIABLE = "env:"  # begins a source that is an environment variable
HASHED = "sha256:"  # begins a line that holds a key's hash
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # also the name of the tenant's folder
_KEY = re.compile(r"[!-~]{8,256}")
_HASH = re.compile(HASHED + r"([0-9a-f]{64})")
_WANTED = (
    "wanted `key tenant`: a key of 8 to 256 printable characters, or sha256: and its 64 hex digits, and a tenant of 1 "
    "to 64 letters, digits, '_' and '-'"
)
log = logging.getLogger("rlsys.serve")


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's hash and whose it is."""

    digest: bytes
    tenant: str


class KeyTable:
    """Keys that do not change."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self._entries = entries

    def entry(self, key: str) -> Entry | None:
        """The key's entry. Takes the same time for any key."""
        digest, found = digest_of(key), None
        for each in self._current():
            if hmac.compare_digest(each.digest, digest):
                found = each
        return found

    def tenant(self, key: str) -> str | None:
        found = self.entry(key)
        return None if found is None else found.tenant

    def digests(self, tenant: str) -> list[bytes]:
        """Hashes of the tenant's keys."""
        return [each.digest for each in self._current() if each.tenant == tenant]

    @property
    def tenants(self) -> list[str]:
        return sorted({each.tenant for each in self._current()})

    def _current(self) -> tuple[Entry, ...]:
        return self._entries


class KeyFile(KeyTable):
    """Keys of a file with one `key tenant` per line; a changed file takes effect with the next request.

    A file that changes into a wrong one, or vanishes, leaves the keys before in force, and the log says why.

    Raises:
        ConfigError: the file is readable by others, or a line has another form. The message holds no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        super().__init__(_of_file(path))
        self._error = ""

    def _current(self) -> tuple[Entry, ...]:
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._entries, self._stamp, self._error = _of_file(self._path), stamp, ""
        except ConfigError as error:
            if str(error) != self._error:
                log.error("the keys before stay in force: %s", error)
            self._error = str(error)
        return self._entries


class NoKeys(KeyTable):
    """Any non-empty key belongs to one tenant. A page in the user's browser cannot send the header."""

    def __init__(self) -> None:
        super().__init__((Entry(b"", LOCAL),))

    def entry(self, key: str) -> Entry | None:
        return self._entries[0] if key else None


Keys = KeyTable


def read_keys(source: str | None, variables: MutableMapping[str, str]) -> Keys:
    """Keys of a file, of ``env:NAME``, or none. The variable is removed: no child process inherits it.

    Raises:
        ConfigError: there is no such source, or it holds something else.
    """
    if source is None:
        return NoKeys()
    if not source.startswith(VARIABLE):
        return KeyFile(Path(source))
    name = source.removeprefix(VARIABLE)
    if name not in variables:
        raise ConfigError(f"keys: the environment variable {name} is not set; wanted `key tenant`, several with ';'")
    return KeyTable(_entries(variables.pop(name).replace(";", "\n").splitlines(), f"the environment variable {name}"))


def new_key() -> str:
    return PREFIX + secrets.token_hex(24)


def hashed_line(key: str, tenant: str) -> str:
    """The line of a keys file that stands for this key without showing it.

    Raises:
        ConfigError: the key or the tenant has another form. The message holds no key.
    """
    (found,) = _entries([f"{key} {tenant}"], "the given key and tenant")
    return f"{HASHED}{found.digest.hex()} {tenant}"


def create_key_file(path: Path, tenant: str = LOCAL) -> None:
    """Write a file with one new key, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{new_key()} {tenant}\n")


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"keys: {path}: cannot be read: {error.strerror}") from None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _of_file(path: Path) -> tuple[Entry, ...]:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(f"keys: {path}: has mode {mode:04o}, so others can read it; wanted 0600 (chmod 600)")
            text = file.read().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"keys: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"keys: {path}: holds bytes that are no UTF-8") from None
    return _entries(text.splitlines(), str(path))


def _entries(lines: Iterable[str], source: str) -> tuple[Entry, ...]:
    found: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = line.split()
        if len(words) != 2 or not _TENANT.fullmatch(words[1]):
            raise ConfigError(f"keys: {source}: line {number}: {_WANTED}")
        digest = _digest_in(words[0])
        if digest is None:
            raise ConfigError(f"keys: {source}: line {number}: {_WANTED}")
        if found.setdefault(digest, words[1]) != words[1]:
            raise ConfigError(f"keys: {source}: line {number}: this key is another tenant's already; wanted one tenant")
    if not found:
        raise ConfigError(f"keys: {source}: has no key; wanted at least one line `key tenant`")
    return tuple(Entry(digest, tenant) for digest, tenant in found.items())


def _digest_in(word: str) -> bytes | None:
    hashed = _HASH.fullmatch(word)
    if hashed is not None:
        return bytes.fromhex(hashed[1])
    if word.startswith(HASHED) or not _KEY.fullmatch(word):
        return None
    return digest_of(word)
