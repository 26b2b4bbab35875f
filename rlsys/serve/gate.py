"""ASGI middleware in front of all routes: API keys, body limits, and the form of every error."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rlsys.serve.errors import Refusal
from rlsys.serve.front import Front
from rlsys.serve.keys import Keys
from rlsys.serve.wire.results import JSON, json_bytes

Message = MutableMapping[str, Any]  # Any: ASGI's messages
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/api/v1/healthz"})
SERVED_TO_THE_END = ("/retrieve_future", "/session_heartbeat", "/telemetry", "/finish")
SIGNED_PREFIX = "/api/v1/files/"  # downloads: the address itself is signed
NO_KEY = "X-API-Key: found no key that this server knows; wanted one of its keys file"
SLOW_S = 5.0  # requests that take longer are logged, except polls
log = logging.getLogger("rlsys.serve.access")


class Gate:
    """Answers 401, 408 and 413 itself. The application finds the tenant in ``scope["state"]``, and the body read."""

    def __init__(self, app: App, keys: Keys, front: Front) -> None:
        self._app, self._keys, self._front = app, keys, front
        self._signer, self._limits = front.signer, front.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        reference = ""
        try:
            self._admit(scope)
            if self._front.closing and scope["method"] == "POST" and not scope["path"].endswith(SERVED_TO_THE_END):
                raise Refusal(503, "the server is stopping", {"Retry-After": "5"})
            body = await self._body(scope, receive)
            if body is None:  # the client left
                return
            await self._app(scope, _replay(body, receive), noting)
        except Refusal as refusal:
            await _answer(noting, refusal.status, refusal.detail, refusal.headers)
        except Exception:  # the outermost edge: a client gets a reference, the log the rest
            reference = secrets.token_hex(6)
            log.exception("%s %s failed, reference %s", scope["method"], scope["path"][:200], reference)
            if not status:
                await _answer(noting, 500, f"internal error of the server; reference {reference}", {})
        seconds = time.monotonic() - began
        if status >= 500 or (seconds > SLOW_S and not scope["path"].endswith("retrieve_future")):
            tenant_name = scope.get("state", {}).get("tenant")
            log.warning(
                "%s %s %s %s %.1f s %s", tenant_name, scope["method"], scope["path"][:200], status, seconds, reference
            )

    def _admit(self, scope: Scope) -> None:
        """Note the tenant of the request's key, and whether it is a key of the file or a token that stands for one."""
        path, state = scope["path"], scope.setdefault("state", {})
        if path in OPEN_PATHS or path.startswith(SIGNED_PREFIX):
            return
        given = [value for name, value in scope["headers"] if name == b"x-api-key"]
        key = given[0].decode("latin-1") if len(given) == 1 else ""
        owner = self._keys.tenant(key)
        tenant = owner or self._signer.tenant_of(key)
        if tenant is None:
            raise Refusal(401, NO_KEY)
        state["tenant"], state["has_key"] = tenant, owner is not None

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        limit = self._limits.body_bytes
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or len(declared) > 18:
            raise Refusal(400, "Content-Length: found no number")
        too_large = Refusal(
            413, f"body: found more than {limit} bytes; wanted at most limits.body_bytes", {"Connection": "close"}
        )
        if int(declared) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.slow_body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(
                400,
                f"body: was not complete after {self._limits.slow_body_s:g} s (limits.slow_body_s)",
                {"Connection": "close"},
            ) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, status: int, detail: str, headers: MutableMapping[str, str]) -> None:
    body = json_bytes({"detail": detail})
    all_headers = {"Content-Type": JSON, "Content-Length": str(len(body)), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
