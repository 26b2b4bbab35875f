"""The command `rlsys serve`: starts the deployments, the controller and the HTTP process, keeps them running, and stops
cleanly on SIGTERM and Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import ray
from ray.actor import ActorHandle
from rich.console import Console

from actors.front.controller_actor import call_now, start_controller
from actors.front.http_supervisor import HttpSupervisor
from actors.service.deployment import RayBackend
from actors.service.http_backend import DeploymentBackend
from rlsys.errors import ConfigError, RlsysError
from rlsys.serve.backend import Base
from rlsys.serve.checkpoints import check_store
from rlsys.serve.config import ServeConfig, is_loopback
from rlsys.serve.keys import VARIABLE, create_key_file, read_keys
from rlsys.serve.operator.guard import token_of
from rlsys.serve.tls import certificate_of
from rlsys.utils import folder_lock

TEND_S = 0.1
STATUS_S = 10.0
START_S = 600.0  # of the controller: it may write many models' checkpoints of an earlier server
STOP_S = 120.0
LAST_POLLS_S = 0.5  # for clients that fetch their last results


def serve(config: ServeConfig) -> None:
    """Serve until a signal. Returns after running requests are done and the deployments started here have ended; after
    SIGTERM before the server is up, once what had started has ended.

    Raises:
        KeyboardInterrupt: Ctrl-C before the server is up. What had started has ended.
        ActorFailedError: the HTTP process ends again and again.
    """
    console = Console(highlight=False, soft_wrap=True)
    config = config.model_copy(update={"checkpoints": str(Path(config.checkpoints).absolute())})
    variables = _key_variables(config)
    certificate_of(config.bind)
    signal.signal(signal.SIGTERM, _terminate)
    token_of(config.operator)  # what is wrong with its file shows before any deployment starts
    with (
        contextlib.suppress(_TerminatedError),
        _listening("bind", config.bind.host, config.bind.port) as listener,
        _beside(config) as operator,
        _alone(Path(config.checkpoints)),
    ):
        check_store(Path(config.checkpoints))  # its faults show before any deployment starts
        console.print(f"starting {', '.join(config.models)} ...")
        cluster = _connected(config)
        try:
            # What the controller joins. This process, which started the actors, replaces those that die.
            DeploymentBackend(cluster, config)
            name = f"controller/{uuid.uuid4().hex[:12]}"
            _run(config, name, start_controller(config, name), listener, operator, console, variables)
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


def _run(
    config: ServeConfig,
    name: str,
    controller: ActorHandle,
    listener: socket.socket,
    operator: socket.socket | None,
    console: Console,
    variables: dict[str, str],
) -> None:
    bases: Sequence[Base] = call_now(controller, "bases", timeout_s=START_S)
    http = HttpSupervisor(config, ray.get_runtime_context().gcs_address, name, listener, operator, variables)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one does not cut off the end of the deployments
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        _show_start(config, bases, listener, operator, console)
        shown = time.monotonic()
        while not signals:
            time.sleep(TEND_S)
            http.tend()
            if time.monotonic() - shown > STATUS_S:
                shown = time.monotonic()
                _show_status(controller, console)
        console.print("stopping: running requests are completed, new ones are refused")
        http.command("close")
        call_now(controller, "stop", timeout_s=STOP_S)
        time.sleep(LAST_POLLS_S)
    finally:
        http.stop()
        ray.kill(controller)


def _show_status(controller: ActorHandle, console: Console) -> None:
    with contextlib.suppress(RlsysError):  # it is starting again
        text = call_now(controller, "status_line", timeout_s=STATUS_S)
        if text is not None:
            console.print(text)


def _show_start(
    config: ServeConfig,
    bases: Sequence[Base],
    listener: socket.socket,
    operator: socket.socket | None,
    console: Console,
) -> None:
    has_tls = config.bind.tls_certificate is not None
    url = _url(config.bind.host, listener, has_tls)
    console.print(f"rlsys serve: {url}")
    for base in bases:
        names = ", ".join((base.name, *base.aliases))
        console.print(f"  {names}: context {base.about.max_length} tokens, LoRA rank up to {base.about.max_lora_rank}")
    console.print(f"  checkpoints: {config.checkpoints}")
    if operator is not None:
        host = config.operator.host
        console.print(f"  status and metrics: {_url(host, operator, has_tls and not is_loopback(host))}")
    console.print("for clients:")
    console.print(f"  export TINKER_BASE_URL={url}")
    if config.keys is None:
        console.print("  export TINKER_API_KEY=tml-any")
    elif config.keys.startswith(VARIABLE):
        console.print(f"  export TINKER_API_KEY=...  # a key of ${config.keys.removeprefix(VARIABLE)}")
    else:
        console.print(f"  export TINKER_API_KEY=$(grep -m1 -oE '^(tml|sk)-[^ ]*' {shlex.quote(str(config.keys))})")


def _key_variables(config: ServeConfig) -> dict[str, str]:
    """Write the file of keys if there is none, and read the keys once, so that their faults show before a start.

    Returns the environment variable that holds them, which is removed before Ray's processes could inherit it.
    """
    source = config.keys
    if source is not None and source.startswith(VARIABLE):
        name = source.removeprefix(VARIABLE)
        held = {name: os.environ[name]} if name in os.environ else {}
        read_keys(source, os.environ)
        return held
    if source is not None and not Path(source).exists():
        try:
            create_key_file(Path(source))
        except OSError as error:
            raise ConfigError(f"keys: {source}: cannot be written: {error.strerror}") from None
        logging.getLogger("rlsys.serve").info("wrote a new key to %s", source)
    read_keys(source, {})
    return {}


@contextlib.contextmanager
def _alone(checkpoints: Path) -> Iterator[None]:
    """Hold the folder of checkpoints: its database has one controller."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = folder_lock.acquire(checkpoints / ".lock")
    except folder_lock.HeldError as error:
        raise ConfigError(
            f"checkpoints: {checkpoints}: another server serves this folder ({error.holder}); stop it, or choose "
            "another folder"
        ) from None
    except OSError as error:
        raise ConfigError(f"checkpoints: {checkpoints}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(lock)


def _beside(config: ServeConfig) -> contextlib.AbstractContextManager[socket.socket | None]:
    """The operator's socket; None: its side is off."""
    if not config.operator.enabled:
        return contextlib.nullcontext()
    return _listening("operator", config.operator.host, config.operator.port_beside(config.bind.port))


@contextlib.contextmanager
def _listening(section: str, host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket: whether the address is free shows before any deployment starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=4096)
    except OSError as error:
        option = "--port" if section == "bind" else "operator.port=PORT"
        raise ConfigError(
            f"{section}: {host} port {port}: {error.strerror}; choose another port ({option}), or stop what uses it"
        ) from None
    with listener:
        yield listener


def _url(host: str, listener: socket.socket, has_tls: bool) -> str:
    port = listener.getsockname()[1]
    return f"{'https' if has_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
