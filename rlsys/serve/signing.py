"""Signed tokens: addresses of downloads, and the short-lived keys of clients that exchange theirs."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import jwt
from jwt.types import Options

ALGORITHM = "HS256"
KEY, FILE = "key", "file"  # what a token is for: one kind is never taken for the other
KEY_LIFE = timedelta(hours=1)
FILE_LIFE = timedelta(minutes=15)
REQUIRED: Options = {"require": ["exp", "sub", "aud", "of"]}
ARCHIVE = ""  # name of the file that stands for all of them


@dataclass(frozen=True, slots=True)
class Download:
    """One file of a checkpoint, or all of them as an archive.

    Clients can read what a token says: no tenant but their own, and no folder.
    """

    reader: str  # tenant that asked, and that must still be allowed to read
    path: str  # tinker://...
    file: str
    content: str  # identity of the content: a later checkpoint of the same name is another one


def new_secret() -> bytes:
    return secrets.token_bytes(32)


class Signer:
    """Signs with a secret that all processes of a server share, and that outlasts them."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def key_for(self, tenant: str, digest: bytes) -> str:
        """A key of the tenant that ends by itself, and with the key that has this hash."""
        at = datetime.now(UTC)
        return self._sign({"aud": KEY, "sub": tenant, "of": self._mark(digest), "iat": at, "exp": at + KEY_LIFE})

    def tenant_of(self, token: str, digests: Callable[[str], Iterable[bytes]]) -> str | None:
        """The token's tenant. `digests`: hashes of a tenant's present keys."""
        found = self._verify(token, KEY)
        if found is None:
            return None
        tenant, mark = str(found["sub"]), str(found["of"])
        return tenant if any(hmac.compare_digest(self._mark(each), mark) for each in digests(tenant)) else None

    def link(self, download: Download) -> tuple[str, datetime]:
        """Token of an address, and when it ends."""
        expires = datetime.now(UTC) + FILE_LIFE
        body: dict[str, object] = {"aud": FILE, "sub": download.reader, "exp": expires}
        return self._sign({**body, "path": download.path, "file": download.file, "of": download.content}), expires

    def download_of(self, token: str) -> Download | None:
        found = self._verify(token, FILE)
        if found is None:
            return None
        return Download(str(found["sub"]), str(found["path"]), str(found["file"]), str(found["of"]))

    def _mark(self, digest: bytes) -> str:
        """Stands for a key's hash, which whoever sees a token cannot compute from a guess."""
        return hmac.new(self._secret, digest, hashlib.sha256).hexdigest()[:32]

    def _sign(self, body: dict[str, object]) -> str:
        return jwt.encode(body, self._secret, ALGORITHM)

    def _verify(self, token: str, audience: str) -> dict[str, object] | None:
        try:
            return dict(jwt.decode(token, self._secret, [ALGORITHM], audience=audience, options=REQUIRED))
        except jwt.InvalidTokenError:
            return None
