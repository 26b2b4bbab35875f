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
from collections.abc import Iterator

import ray
import uvloop
from pydantic import BaseModel

from actors.front.controller_actor import find_controller, remote_controller
from rlsys.serve.app import build_app
from rlsys.serve.config import ServeConfig
from rlsys.serve.connections import Server, ServerConfig, allow_connections
from rlsys.serve.front import Front, connect
from rlsys.serve.keys import Keys, read_keys
from rlsys.serve.tls import certificate_of

CLOSE_CONNECTIONS_S = 5  # held polls end after this at a stop
SERVES = "serves"


class Start(BaseModel):
    """What the process needs. `listener`: file descriptor of a socket that the parent keeps open."""

    config: ServeConfig
    cluster: str  # address of Ray's head
    controller: str  # name of its actor
    listener: int
    variables: dict[str, str]  # that of the keys, which no other process has


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
    with socket.socket(fileno=start.listener) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(start, keys, listener))


async def _run(start: Start, keys: Keys, listener: socket.socket) -> None:
    controller = remote_controller(find_controller(start.controller))
    front = await connect(controller, start.config.limits)
    server = http_server(front, keys, start.config)
    following = asyncio.create_task(_follow(front, server))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    print(SERVES, flush=True)
    await serving
    following.cancel()
    front.close()


def http_server(front: Front, keys: Keys, config: ServeConfig) -> Server:
    return _Server(
        ServerConfig(
            build_app(front, keys),
            config.bind,
            config.limits,
            certificate_of(config.bind),
            timeout_graceful_shutdown=CLOSE_CONNECTIONS_S,
            lifespan="off",
        )
    )


class _Server(Server):
    """Leaves the signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _follow(front: Front, server: Server) -> None:
    """Execute the parent's commands."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while True:
        line = (await reader.readline()).strip()
        if line == b"close":
            front.closing = True
        elif line in (b"exit", b""):
            front.closing = True
            server.should_exit = True
            return


if __name__ == "__main__":
    main()
