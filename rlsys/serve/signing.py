"""Signed tokens: addresses of downloads, and the short-lived keys of clients that exchange theirs."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import jwt
from jwt.types import Options

ALGORITHM = "HS256"
KEY, FILE = "key", "file"  # what a token is for: one kind is never taken for the other
KEY_LIFE = timedelta(hours=1)
FILE_LIFE = timedelta(minutes=15)
REQUIRED: Options = {"require": ["exp", "sub", "aud"]}
ARCHIVE = ""  # name of the file that stands for all of them


@dataclass(frozen=True, slots=True)
class Download:
    """One file of a checkpoint, or all of them as an archive."""

    owner: str  # tenant whose folder holds the checkpoint
    path: str  # tinker://...
    file: str


def new_secret() -> bytes:
    return secrets.token_bytes(32)


class Signer:
    """Signs with a secret that all processes of a server share, and that outlasts them."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def key_for(self, tenant: str) -> str:
        """A key of the tenant that ends by itself."""
        at = datetime.now(UTC)
        return self._sign({"aud": KEY, "sub": tenant, "iat": at, "exp": at + KEY_LIFE})

    def tenant_of(self, token: str) -> str | None:
        found = self._verify(token, KEY)
        return None if found is None else str(found["sub"])

    def link(self, download: Download) -> tuple[str, datetime]:
        """Token of an address, and when it ends."""
        expires = datetime.now(UTC) + FILE_LIFE
        body = {"aud": FILE, "sub": download.owner, "path": download.path, "file": download.file, "exp": expires}
        return self._sign(body), expires

    def download_of(self, token: str) -> Download | None:
        found = self._verify(token, FILE)
        return None if found is None else Download(str(found["sub"]), str(found["path"]), str(found["file"]))

    def _sign(self, body: dict[str, object]) -> str:
        return jwt.encode(body, self._secret, ALGORITHM)

    def _verify(self, token: str, audience: str) -> dict[str, object] | None:
        try:
            return dict(jwt.decode(token, self._secret, [ALGORITHM], audience=audience, options=REQUIRED))
        except jwt.InvalidTokenError:
            return None
