"""Errors in OpenAI's form, and keys as OpenAI's clients send them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from rlsys.serve.errors import Refusal
from rlsys.serve.wire.results import json_bytes

Message = MutableMapping[str, Any]  # Any: ASGI's messages
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PREFIX = "/v1/"
NO_KEY = (
    "Authorization: found no key that this server knows; wanted `Authorization: Bearer KEY`, or X-API-Key, with one of "
    "its keys file"
)
_CODES = {401: "invalid_api_key", 413: "body_too_large", 429: "rate_limit_exceeded", 503: "unavailable"}


class DoorRefusal(Refusal):
    """An answer other than 200, with the parameter at fault and OpenAI's code."""

    def __init__(
        self,
        detail: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, headers)
        self.param, self.code = param, code

    def __reduce__(self) -> tuple[type[DoorRefusal], tuple[object, ...]]:  # type: ignore[override]
        return DoorRefusal, (self.detail, self.param, self.status, self.code, self.headers)


def model_not_found(name: str) -> DoorRefusal:
    """The same for what does not exist and for what belongs to another tenant."""
    text = f"model {name[:200]!r}: not found; GET /v1/models lists what this key can use"
    return DoorRefusal(text, "model", 404, "model_not_found")


def error_value(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


class OpenAIEdge:
    """ASGI middleware outside of the gate: takes `Authorization: Bearer KEY` for X-API-Key on paths under /v1/, and
    gives errors of the layers below OpenAI's form."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        scope["headers"] = _with_key(scope["headers"])
        await self._app(scope, receive, _Rewriting(send))


class _Rewriting:
    """Passes an answer on; one with an error status is held, and rewritten if its body is no error of OpenAI's form."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
            return
        if self._start is None:
            await self._send(message)
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        start, self._start = self._start, None
        body = _rewritten(start["status"], self._body)
        kept = [(name, value) for name, value in start["headers"] if name not in (b"content-length", b"content-type")]
        extra = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({**start, "headers": [*kept, *extra]})
        await self._send({"type": "http.response.body", "body": body})


def _rewritten(status: int, body: bytes) -> bytes:
    try:
        value = json.loads(body)
    except ValueError:
        value = {}
    if isinstance(value, dict) and "error" in value:
        return body
    detail = value.get("detail") if isinstance(value, dict) else None
    message = NO_KEY if status == 401 else str(detail or f"status {status}")
    return json_bytes(error_value(status, message))


def _with_key(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers with the bearer token as X-API-Key. A request that has both, or two tokens, is left as it is: the gate
    takes exactly one X-API-Key."""
    tokens = [value for name, value in headers if name == b"authorization"]
    if any(name == b"x-api-key" for name, _ in headers) or len(tokens) != 1:
        return headers
    scheme, _, token = tokens[0].partition(b" ")
    if scheme.lower() != b"bearer":
        return headers
    return [*headers, (b"x-api-key", token.strip())]
