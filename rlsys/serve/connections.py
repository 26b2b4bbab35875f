"""uvicorn's server with limits on its connections: their number, their headers, and how slow a client may be.

One pass over all connections a second finds the slow ones, so that a connection costs no timer.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rlsys.serve.config import Bind, Limits
from rlsys.serve.tls import Certificate
from rlsys.serve.wire.results import json_bytes

KEEP_ALIVE_S = 80  # clients reuse connections for up to 75 s
FRAMING = 64 * 1024  # bytes beside headers and body that a request may have between two parts of its body
PROGRESS = 64 * 1024  # bytes that a client reads in limits.slow_read_s, or all of them
SPARE_FILES = 512  # beside connections
TICKS_A_SECOND = 10  # uvicorn's
TLS_CHECK_S = 5
_PHRASES = {431: "Request Header Fields Too Large", 503: "Service Unavailable"}
log = logging.getLogger("rlsys.serve.access")


class ServerConfig(uvicorn.Config):
    """uvicorn's settings for an application, an address and limits."""

    def __init__(
        self, app: ASGIApp, bind: Bind, limits: Limits, certificate: Certificate | None, **settings: Any
    ) -> None:
        super().__init__(
            cast(Any, app),
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            proxy_headers=bind.behind_tls_proxy,  # nobody else may say which address a client has
            forwarded_allow_ips=bind.proxies,
            ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
            **settings,
        )
        self.limits, self.certificate = limits, certificate
        self.is_behind_proxy = bind.behind_tls_proxy
        self.of_address: Counter[str] = Counter()


class Server(uvicorn.Server):
    """Closes connections of clients that are too slow, and loads a renewed certificate."""

    config: ServerConfig

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_A_SECOND == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.close_if_slow(now)
        certificate = self.config.certificate
        if certificate is not None and counter % (TLS_CHECK_S * TICKS_A_SECOND) == 0:
            await asyncio.to_thread(certificate.refresh)
        return await super().on_tick(counter)


class Connection(HttpToolsProtocol):
    """One connection of a client."""

    config: ServerConfig

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._limits = self.config.limits
        self._head_since: float | None = self.loop.time()
        self._pending = 0  # bytes since the last part of a body, or since the request's first
        self._unread: tuple[float, int] | None = None  # since when a client has not read, and how much
        self._is_refused = False
        self._address = self.client[0] if self.client else ""
        of_address = self.config.of_address
        of_address[self._address] += 1
        if len(self.connections) > self._limits.connections:
            self._refuse(503, f"connections: found more than limits.connections = {self._limits.connections}")
        elif of_address[self._address] > self._limits.connections_per_address and not self.config.is_behind_proxy:
            self._refuse(
                503,
                "connections: found more from this address than limits.connections_per_address = "
                f"{self._limits.connections_per_address}",
            )

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        of_address = self.config.of_address
        of_address[self._address] -= 1
        if not of_address[self._address]:
            del of_address[self._address]

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._is_idle() and self._head_since is None:
            self._head_since = self.loop.time()
        self._pending += len(data)
        super().data_received(data)
        # The parser holds headers, trailers and chunk extensions that are not complete, however long they are.
        if self._pending > self._limits.header_bytes + FRAMING and not self.transport.is_closing():
            self._refuse(431, f"headers: found more than limits.header_bytes = {self._limits.header_bytes}")

    def on_headers_complete(self) -> None:
        self._head_since = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        super().on_message_complete()

    def close_if_slow(self, now: float) -> None:
        # The gate limits the time of answers that are being sent; these bytes are the ends of those that were.
        unread = self.transport.get_write_buffer_size()
        if not unread:
            self._unread = None
        elif self._unread is None or not self._unread[1] - PROGRESS < unread <= self._unread[1]:
            self._unread = now, unread
        elif now - self._unread[0] > self._limits.slow_read_s:
            log.warning("%s: closed: read too slowly (limits.slow_read_s)", self._address)
            self.transport.abort()
            return
        is_late = self._head_since is not None and now - self._head_since > self._limits.slow_header_s
        if is_late and self._is_idle() and not self.transport.is_closing():
            self.transport.close()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: int, detail: str) -> None:
        self._is_refused = True
        body = json_bytes({"detail": detail})
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\nretry-after: 5\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def allow_connections(number: int) -> None:
    """Raise this process's limit on open files to what that many connections need, where the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("limits.connections = %d: this process may open %d files only (ulimit -Hn)", number, most)
