"""ASGI middleware of the operator's side: a token beyond loopback, and no page of another site."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError
from rlsys.serve.config import OperatorSection, is_loopback
from rlsys.serve.wire.results import JSON, json_bytes

Message = MutableMapping[str, Any]  # Any: ASGI's messages
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = frozenset({"/healthz", "/readyz", "/api/v1/healthz", "/api/v1/readyz"})
LEAST_CHARS = 16


class Guard:
    """Asks for the token as a bearer's, or as the password that a browser asks its user for.

    Without a token, on loopback, a request must name loopback as its host: a page of another site, whose name leads to
    this machine, names its own.
    """

    def __init__(self, app: App, token: str | None) -> None:
        self._app = app
        self._digest = None if token is None else _digest(token)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or self._is_allowed(scope["headers"]):
            await self._app(scope, receive, send)
            return
        if self._digest is None:
            await _refuse(send, 403, "Host: found another than 127.0.0.1, ::1 or localhost", [])
        else:
            challenge = (b"www-authenticate", b'Basic realm="rlsys operator"')
            await _refuse(send, 401, "Authorization: wanted the token of operator.token_file", [challenge])

    def _is_allowed(self, headers: list[tuple[bytes, bytes]]) -> bool:
        if self._digest is None:
            hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
            return len(hosts) == 1 and is_loopback(_without_port(hosts[0]))
        given = [value for name, value in headers if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(_digest(_token(given[0])), self._digest)


def token_of(section: OperatorSection) -> str | None:
    """
    Raises:
        ConfigError: the file cannot be read, or is no token.
    """
    if section.token_file is None:
        return None
    try:
        lines = Path(section.token_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"operator.token_file: {section.token_file}: cannot be read: {error}") from None
    token = lines[0].strip() if lines else ""
    if len(token) < LEAST_CHARS:
        raise ConfigError(
            f"operator.token_file: {section.token_file}: its first line has {len(token)} characters; wanted a token of "
            f"{LEAST_CHARS} or more"
        )
    return token


def _token(header: bytes) -> str:
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip().decode("latin-1")
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("latin-1").partition(":")[2]
        except binascii.Error:
            return ""
    return ""


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _digest(token: str) -> bytes:
    return hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=32).digest()


async def _refuse(send: Send, status: int, detail: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = json_bytes({"detail": detail})
    fixed = [(b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})
