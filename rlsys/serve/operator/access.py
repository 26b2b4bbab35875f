"""Access lines: one per slow or failed request, as text or JSON. Every request is counted."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Protocol

from rlsys.serve.config import LogSection

Message = MutableMapping[str, Any]  # Any: ASGI's messages
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OTHER = "other"  # of a request that no route matched: paths from outside are no labels
POLL = "/retrieve_future"  # held until there is a result, so never slow; 408 is its answer for "ask again"
SIGNED_PREFIX = "/api/v1/files/"  # downloads: the address itself is signed
SEARCHED_BYTES = 16 * 1024  # of a body, for the ids in it
_ID = re.compile(rb"([0-9a-f]{32}):(train|sample):\d{1,10}")
_SESSION = re.compile(rb'"session_id"\s*:\s*"([0-9a-f]{32})"')
_MODEL = re.compile(rb'"(?:base_model|model_path|model)"\s*:\s*"([^"\\\x00-\x1f]{1,200})"')
log = logging.getLogger("rlsys.serve.access")


@dataclass(frozen=True, slots=True)
class Line:
    """One request."""

    tenant: str | None
    method: str
    path: str
    status: int
    seconds: float
    session: str | None
    model: str | None  # a training run, a sampling session, or the name of a base or checkpoint
    reference: str | None  # what the answer names; the log has the error under it


def reference_of(scope: MutableMapping[str, Any]) -> str:
    """What the answer to a request names, so that its user can name it to the operator. Its access line has it too."""
    reference: str = scope.setdefault("state", {}).setdefault("reference", secrets.token_hex(6))
    return reference


def shown_path(scope: MutableMapping[str, Any]) -> str:
    """The path as a log may hold it: on one line, and without the secret of a signed address."""
    path: str = scope["path"]
    return SIGNED_PREFIX + "..." if path.startswith(SIGNED_PREFIX) else ascii(path[:200])[1:-1]


class Observer(Protocol):
    """Counts requests."""

    def request(self, method: str, route: str, status: int, seconds: float) -> None: ...


class AccessLog:
    """ASGI middleware outside of all others. Layers inside note ``tenant`` and ``reference`` in ``scope["state"]``."""

    def __init__(self, app: App, section: LogSection, observer: Observer) -> None:
        self._app, self._section, self._observer = app, section, observer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        noted = scope.setdefault("state", {})
        began, status, head = time.monotonic(), 0, b""

        async def reading() -> Message:
            nonlocal head
            message = await receive()
            if message["type"] == "http.request" and len(head) < SEARCHED_BYTES:
                head += message.get("body", b"")[: SEARCHED_BYTES - len(head)]
            return message

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, reading, noting)
        finally:
            seconds = time.monotonic() - began
            self._observer.request(scope["method"], _route(scope), status, seconds)
            if self._is_told(scope["path"], status, seconds):
                session, model = ids_in(scope["path"].encode() + b"\n" + head)
                self._tell(
                    Line(
                        noted.get("tenant"),
                        scope["method"],
                        shown_path(scope),
                        status,
                        round(seconds, 3),
                        session,
                        model,
                        noted.get("reference"),
                    )
                )

    def _is_told(self, path: str, status: int, seconds: float) -> bool:
        if path.endswith(POLL):
            return status >= 400 and status != 408
        return status >= 400 or status == 0 or seconds > self._section.slow_s

    def _tell(self, line: Line) -> None:
        level = logging.WARNING if line.status >= 500 else logging.INFO
        log.log(level, "%s", as_json(line) if self._section.json_lines else as_text(line))


def ids_in(text: bytes) -> tuple[str | None, str | None]:
    """Session and model that a request names; None where it names none, or its body is compressed."""
    found = _ID.search(text)
    if found is not None:
        return found[1].decode(), found[0].decode()
    session, model = _SESSION.search(text), _MODEL.search(text)
    return (
        None if session is None else session[1].decode(),
        None if model is None else model[1].decode("utf-8", "replace"),
    )


def as_text(line: Line) -> str:
    parts = [line.tenant or "-", line.method, line.path, str(line.status or "no answer"), f"{line.seconds:.2f} s"]
    named = (("session", line.session), ("model", line.model), ("reference", line.reference))
    parts.insert(0, f"{datetime.now():%Y-%m-%d %H:%M:%S}")
    text = " ".join([*parts, *(f"{name}={value}" for name, value in named if value is not None)])
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def as_json(line: Line) -> str:
    return json.dumps({"time": round(time.time(), 3), **asdict(line)})


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route's pattern: a label with few values."""
    return getattr(scope.get("route"), "path", OTHER)
