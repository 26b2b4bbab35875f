"""ASGI middleware in front of all routes: API keys, limits of headers and bodies, and the form of every error."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from rlsys.serve.errors import Refusal
from rlsys.serve.failed_keys import FailedKeys
from rlsys.serve.front import Front
from rlsys.serve.keys import Keys, NoKeys
from rlsys.serve.operator.access import SIGNED_PREFIX, reference_of, shown_path
from rlsys.serve.wire.results import JSON, json_bytes

Message = MutableMapping[str, Any]  # Any: ASGI's messages
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/api/v1/healthz", "/api/v1/readyz"})
SERVED_TO_THE_END = ("/retrieve_future", "/session_heartbeat", "/telemetry", "/finish")
LARGE_BODIES = frozenset({"/api/v1/forward", "/api/v1/forward_backward"})
PART = 256 * 2**10
OPEN_BODY_BYTES = 1024  # of a request without a key
log = logging.getLogger("rlsys.serve")


class Gate:
    """Answers 401, 403, 413, 429 and 431 itself. The application finds the tenant in ``scope["state"]``, and the body
    read."""

    def __init__(self, app: App, keys: Keys, front: Front) -> None:
        self._app, self._keys, self._front = app, keys, front
        self._signer, self._limits = front.signer, front.limits
        self._failed = FailedKeys(front.limits)
        self._held: Counter[str] = Counter()  # bytes of bodies in memory, by tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, is_slow = 0, False

        async def noting(message: Message) -> None:
            nonlocal status, is_slow
            if message["type"] == "http.response.start":
                status = message["status"]
            for part in _parts(message):
                if is_slow:  # uvicorn closes the connection of an answer that does not come to its end
                    return
                try:
                    async with asyncio.timeout(self._limits.slow_read_s):
                        await send(part)
                except TimeoutError:
                    is_slow = True
                    log.warning("%s: read too slowly (limits.slow_read_s)", (scope.get("client") or ("",))[0])

        held = _Held(self._held, self._limits.held_bytes)
        try:
            self._admit(scope)
            if self._front.closing and scope["method"] == "POST" and not scope["path"].endswith(SERVED_TO_THE_END):
                raise Refusal(503, "the server is stopping", {"Retry-After": "5"})
            body = await self._body(scope, receive, held)
            if body is None:  # the client left
                return
            await self._app(scope, _replay(body, receive), noting)
        except Refusal as refusal:
            await _answer(noting, refusal.status, refusal.detail, refusal.headers)
        except Exception:  # the outermost edge: a client gets a reference, the log the rest
            reference = reference_of(scope)
            log.exception("%s %s failed, reference %s", scope["method"], shown_path(scope), reference)
            if not status:
                await _answer(noting, 500, f"internal error of the server; reference {reference}", {})
        finally:
            held.release()

    def _admit(self, scope: Scope) -> None:
        """Note the tenant of the request's key, and whether it is a key of the file or a token that stands for one."""
        path, state = scope["path"], scope.setdefault("state", {})
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size + len(scope.get("raw_path", b"")) + len(scope.get("query_string", b"")) > self._limits.header_bytes:
            raise Refusal(
                431,
                f"headers: found more than {self._limits.header_bytes} bytes; wanted at most limits.header_bytes",
                {"Connection": "close"},
            )
        if isinstance(self._keys, NoKeys):
            _refuse_foreign_host(scope)
        if path in OPEN_PATHS or path.startswith(SIGNED_PREFIX):
            return
        given = [value for name, value in scope["headers"] if name == b"x-api-key"]
        key = given[0].decode("latin-1") if len(given) == 1 else ""
        entry = self._keys.entry(key)
        tenant = self._signer.tenant_of(key, self._keys.digests) if entry is None else entry.tenant
        if tenant is None:
            raise self._failed.refusal((scope.get("client") or ("",))[0])
        state["tenant"], state["key_digest"] = tenant, None if entry is None else entry.digest

    async def _body(self, scope: Scope, receive: Receive, held: _Held) -> bytes | None:
        tenant = scope["state"].get("tenant")
        name = "body_bytes" if scope["path"] in LARGE_BODIES else "call_bytes"
        limit = OPEN_BODY_BYTES if tenant is None else getattr(self._limits, name)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or len(declared) > 18:
            raise Refusal(400, "Content-Length: found no number")
        too_large = Refusal(
            413, f"body: found more than {limit} bytes; wanted at most limits.{name}", {"Connection": "close"}
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
                    held.add(tenant or "", len(part))
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(
                400,
                f"body: was not complete after {self._limits.slow_body_s:g} s (limits.slow_body_s)",
                {"Connection": "close"},
            ) from None


class _Held:
    """Bytes of one request's body in memory, counted for its tenant."""

    def __init__(self, counts: Counter[str], limit: int) -> None:
        self._counts, self._limit = counts, limit
        self._tenant, self._size = "", 0

    def add(self, tenant: str, size: int) -> None:
        """
        Raises:
            Refusal: 429: the tenant's bodies together are beyond the limit.
        """
        if self._counts[tenant] + size > self._limit and self._counts[tenant] > self._size:
            raise Refusal(
                429,
                f"body: the bodies of all running requests together have more than limits.held_bytes = {self._limit}",
                {"Connection": "close", "Retry-After": "1"},
            )
        self._tenant = tenant
        self._size += size
        self._counts[tenant] += size

    def release(self) -> None:
        self._counts[self._tenant] -= self._size
        if not self._counts[self._tenant]:
            del self._counts[self._tenant]


def _refuse_foreign_host(scope: Scope) -> None:
    """Without keys, a page whose name was made to lead to this machine (DNS rebinding) could send any header."""
    found = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
    name = re.sub(r":\d*$", "", found).removeprefix("[").removesuffix("]")
    if name.lower() == "localhost":
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise Refusal(
            403, f"Host: found {found[:100]!r}; a server without keys answers to localhost and to addresses alone"
        ) from None


def _parts(message: Message) -> Iterator[Message]:
    """A large body in parts: the server waits for the client before each, so no more than one is in its buffers."""
    body = message.get("body", b"")
    if message["type"] != "http.response.body" or len(body) <= PART:
        yield message
        return
    for start in range(0, len(body), PART):
        more = start + PART < len(body) or message.get("more_body", False)
        yield {"type": message["type"], "body": body[start : start + PART], "more_body": more}


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
