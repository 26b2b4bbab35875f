"""The HTTP process of `rlsys serve`. It holds nothing that a client would miss: when it dies, another takes its place.

    python -m actors.front.http_process

Standard input gives a JSON line (`Start`), then commands, a line each: `close` refuses new work, `exit` ends the
process, and so does the end of the input, when the parent dies. A line on standard output says that it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray
import uvloop
from pydantic import BaseModel
from starlette.types import ASGIApp

from actors.front.controller_actor import find_controller, remote_controller
from rlsys.serve.app import build_app
from rlsys.serve.config import Bind, Limits, ServeConfig, is_loopback
from rlsys.serve.connections import Server, ServerConfig, allow_connections
from rlsys.serve.front import Front, connect
from rlsys.serve.keys import Keys, read_keys
from rlsys.serve.operator.access import AccessLog
from rlsys.serve.operator.app import Operator
from rlsys.serve.operator.guard import token_of
from rlsys.serve.tls import certificate_of

CLOSE_CONNECTIONS_S = 5  # held polls end after this at a stop
OPERATORS_S = 1  # connections of the operator's side
SERVES = "serves"


class Start(BaseModel):
    """What the process needs. `listener`: file descriptor of a socket that the parent keeps open."""

    config: ServeConfig
    cluster: str  # address of Ray's head
    controller: str  # name of its actor
    listener: int
    variables: dict[str, str]  # that of the keys, which no other process has
    operator: int | None = None  # as `listener`, of the operator's side


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and some supervisors signal all processes
        signal.signal(number, signal.SIG_IGN)
    start = Start.model_validate_json(sys.stdin.readline())
    ray.init(address=start.cluster, log_to_driver=False, logging_level="warning")
    for number in (signal.SIGINT, signal.SIGTERM):  # ray.init sets its own
        signal.signal(number, signal.SIG_IGN)
    keys = read_keys(start.config.keys, start.variables)
    allow_connections(start.config.limits.connections)
    log_requests()
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket(fileno=start.listener))
        beside = None if start.operator is None else sockets.enter_context(socket.socket(fileno=start.operator))
        runner = sockets.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        runner.run(_run(start, keys, listener, beside))


async def _run(start: Start, keys: Keys, listener: socket.socket, beside: socket.socket | None) -> None:
    controller = remote_controller(find_controller(start.controller))
    front = await connect(controller, start.config.limits)
    servers = http_servers(front, keys, start.config)
    following = asyncio.create_task(_follow(front, [servers.clients, servers.operator]))
    serving = asyncio.create_task(servers.serve(listener, beside))
    while not (servers.clients.started or serving.done()):
        await asyncio.sleep(0.01)
    print(SERVES, flush=True)
    await serving
    following.cancel()
    front.close()


def log_requests() -> None:
    """Access lines on stderr, as they are: each has its time and its form."""
    access = logging.getLogger("rlsys.serve.access")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False


@dataclass(frozen=True, slots=True)
class Servers:
    """The two ports of one process."""

    clients: Server
    operator: Server
    side: Operator

    async def serve(self, listener: socket.socket, beside: socket.socket | None) -> None:
        """Until both are told to exit. `beside`: of the operator's side; None: it has none."""
        noting = asyncio.create_task(self.side.note_rates())
        serving = [self.clients.serve(sockets=[listener])]
        if beside is not None:
            serving.append(self.operator.serve(sockets=[beside]))
        try:
            await asyncio.gather(*serving)
        finally:
            noting.cancel()


def http_servers(front: Front, keys: Keys, config: ServeConfig) -> Servers:
    side = Operator(front)
    clients = AccessLog(build_app(front, keys), config.log, side.metrics)
    bind = Bind() if is_loopback(config.operator.host) else config.bind
    operators = _server(side.app(token_of(config.operator)), bind, config.limits, OPERATORS_S)
    return Servers(_server(clients, config.bind, config.limits, CLOSE_CONNECTIONS_S), operators, side)


def _server(app: ASGIApp, bind: Bind, limits: Limits, graceful_s: int) -> Server:
    """`bind`: whose certificate it uses."""
    return _Server(
        ServerConfig(
            app,
            bind,
            limits,
            certificate_of(bind),
            timeout_graceful_shutdown=graceful_s,
            lifespan="off",
        )
    )


class _Server(Server):
    """Leaves the signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _follow(front: Front, servers: Sequence[Server]) -> None:
    """Execute the parent's commands."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while True:
        line = (await reader.readline()).strip()
        if line == b"close":
            front.closing = True
        elif line in (b"exit", b""):
            front.closing = True
            for server in servers:
                server.should_exit = True
            return


if __name__ == "__main__":
    main()
