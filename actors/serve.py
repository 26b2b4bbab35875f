"""The process of `rlsys serve`: starts the deployments, serves HTTP, and stops cleanly on SIGTERM and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop
from rich.console import Console

from actors.service.deployment import RayBackend
from actors.service.http_backend import DeploymentBackend
from rlsys.errors import ConfigError
from rlsys.serve.app import build_app, stop_work
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Bind, ServeConfig
from rlsys.serve.keys import KeyFile, Keys, NoKeys, create_key_file
from rlsys.serve.state import State
from rlsys.serve.status import StatusLine

KEEP_ALIVE_S = 80  # clients reuse connections for up to 75 s
CLOSE_CONNECTIONS_S = 5  # held polls end after this at a stop
STATUS_S = 10.0
LAST_POLLS_S = 0.5  # for clients that fetch their last results


def serve(config: ServeConfig) -> None:
    """Serve until a signal. Returns after running requests are done and the deployments started here have ended; after
    SIGTERM before the server is up, once what had started has ended.

    Raises:
        KeyboardInterrupt: Ctrl-C before the server is up. What had started has ended.
    """
    console = Console(highlight=False, soft_wrap=True)
    keys = _keys(config)
    signal.signal(signal.SIGTERM, _terminate)
    with contextlib.suppress(_TerminatedError), _listening(config.bind) as listener:
        console.print(f"starting {', '.join(config.models)} ...")
        store = CheckpointStore(Path(config.checkpoints).absolute())
        cluster = _connected(config)
        try:
            backend = DeploymentBackend(cluster, config)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_run(config, keys, State(backend, config.limits, store), listener, console))
        finally:
            cluster.close()
    console.print("stopped")


class _TerminatedError(BaseException):
    """SIGTERM before the server is up. Not an Exception: no handler of failures on the way takes it for one."""


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, lambda *_: None)  # a second one does not cut off the end of what had started
    raise _TerminatedError


def _connected(config: ServeConfig) -> RayBackend:
    """Ray replaces the handler of SIGTERM: until ray.init returns, by one that ends Ray's processes and exits."""
    try:
        return RayBackend(config.service_config())
    except SystemExit:
        raise _TerminatedError from None
    finally:
        signal.signal(signal.SIGTERM, _terminate)


async def _run(config: ServeConfig, keys: Keys, state: State, listener: socket.socket, console: Console) -> None:
    server = _Server(
        uvicorn.Config(
            build_app(state, keys),
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_CONNECTIONS_S,
            server_header=False,
            date_header=False,
            ws="none",
            ssl_certfile=config.bind.tls_certificate,
            ssl_keyfile=config.bind.tls_key,
        )
    )
    loop = asyncio.get_running_loop()

    async def stop() -> None:
        console.print("stopping: running requests are completed, new ones are refused")
        await stop_work(state)
        await asyncio.sleep(LAST_POLLS_S)
        server.should_exit = True

    stopping: list[asyncio.Task[None]] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        """Stays in place until the process ends: a second signal does not cut off the end of the deployments."""
        if not stopping and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: stopping.append(loop.create_task(stop())) if not stopping else None)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.02)
    if server.started:
        _show_start(config, state, listener, console)
    status = asyncio.create_task(_show_status(state, console))
    try:
        await serving
    finally:
        status.cancel()


class _Server(uvicorn.Server):
    """Leaves the signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _show_status(state: State, console: Console) -> None:
    line = StatusLine(state)
    while True:
        await asyncio.sleep(STATUS_S)
        text = line.text()
        if text is not None:
            console.print(text)


def _show_start(config: ServeConfig, state: State, listener: socket.socket, console: Console) -> None:
    url = _url(config.bind, listener)
    console.print(f"rlsys serve: {url}")
    for base in state.backend.bases.values():
        names = ", ".join((base.name, *base.aliases))
        console.print(f"  {names}: context {base.about.max_length} tokens, LoRA rank up to {base.about.max_lora_rank}")
    console.print(f"  checkpoints: {state.store.root}")
    console.print("for clients:")
    console.print(f"  export TINKER_BASE_URL={url}")
    if config.keys is None:
        console.print("  export TINKER_API_KEY=tml-any")
    else:
        console.print(f"  export TINKER_API_KEY=$(grep -m1 -o '^[^# ]*' {shlex.quote(str(config.keys))})")


def _keys(config: ServeConfig) -> Keys:
    if config.keys is None:
        return NoKeys()
    path = Path(config.keys)
    if not path.exists():
        try:
            create_key_file(path)
        except OSError as error:
            raise ConfigError(f"keys: {path}: cannot be written: {error.strerror}") from None
        logging.getLogger("rlsys.serve").info("wrote a new key to %s", path)
    return KeyFile(path)


@contextlib.contextmanager
def _listening(bind: Bind) -> Iterator[socket.socket]:
    """A listening socket: whether the address is free shows before any deployment starts."""
    family = socket.AF_INET6 if ":" in bind.host else socket.AF_INET
    try:
        listener = socket.create_server((bind.host, bind.port), family=family, backlog=4096)
    except OSError as error:
        raise ConfigError(
            f"bind: {bind.host} port {bind.port}: {error.strerror}; choose another port (--port), or stop what uses it"
        ) from None
    with listener:
        yield listener


def _url(bind: Bind, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    host = f"[{bind.host}]" if ":" in bind.host else bind.host
    return f"{'https' if bind.tls_certificate else 'http'}://{host}:{port}"
