"""An actor's side of its host process.

On CPU an actor's body runs in a fresh process, which imports vLLM once and forks the engine; the actor imports neither
torch nor vLLM. On CUDA, where nothing of this was run yet, the body runs in the actor's process.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from actors.forking.client import SERVER, Forked, NotForkedError, fork
from actors.hosting.channel import Channel, Kind, Message
from actors.hosting.raised import Raised, unpack
from rlsys.errors import ActorDiedError
from rlsys.sandbox.killable_process import describe_exit

CLOSE_S = 3.0  # for a host process to end in order; actors are killed after a few seconds more
GONE_S = 5.0  # for a process to end after its socket did
POLL_S = 0.02
ENTRY = "actors.hosting.serving:serve"


class Host(Protocol):
    async def call(self, method: str, *arguments: object) -> Any:  # what `method` of the body returns
        """Call an async method of the body. Many calls may run at once."""

    def stream(self, method: str, *arguments: object) -> AsyncGenerator[Any, None]:
        """Values of an async generator of the body, as it yields them. Closing this generator closes that one."""

    async def close(self) -> None:
        """End the body's process, if the body has one."""


def start_host(name: str, device: str, body: type, *arguments: object) -> Host:
    """Start the process of an actor, which is called `name` in messages. Its body is `body(*arguments)`."""
    return HostProcess(name, body, arguments) if device == "cpu" else InProcess(body(*arguments))


class InProcess:
    """The body in the actor's own process."""

    def __init__(self, body: object) -> None:
        self._body = body

    async def call(self, method: str, *arguments: object) -> Any:
        return await getattr(self._body, method)(*arguments)

    def stream(self, method: str, *arguments: object) -> AsyncGenerator[Any, None]:
        return getattr(self._body, method)(*arguments)

    async def close(self) -> None:
        pass


def _start(title: str, descriptor: int) -> tuple[subprocess.Popen[bytes] | Forked, str]:
    """A process that serves the socket `descriptor`, and why it was not forked although this node has a fork server."""
    where, why = os.environ.get(SERVER), ""
    if where:
        fingerprint, _, folder = where.partition(" ")
        try:
            return fork(folder, "sampler", fingerprint, [title], ENTRY, [descriptor], sys.path), ""
        except NotForkedError as error:
            why = str(error)
    program = (  # a module's name would be looked up before sys.path is the actor's
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from actors.hosting.serving import main; main({descriptor}, {os.getpid()})"
    )
    command = [sys.executable, "-c", program, title]
    return subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL), why


class HostProcess:
    """A process that inherits environment, CPU affinity, nice level and output files of the actor, and ends with it.

    Construct it in a thread that lives as long as the actor: with this thread the kernel ends the process.
    """

    def __init__(self, name: str, body: type, arguments: Sequence[object]) -> None:
        self._name = name
        here, there = socket.socketpair()
        with there:
            self._process, self.not_forked = _start(f"rlsys host of {name}", there.fileno())
        self._channel = Channel(here)
        self._channel.send(0, Kind.CALL, (body, tuple(arguments)))
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._streams: dict[int, asyncio.Queue[Message | None]] = {}  # None: the process has ended
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = ""  # how, once the process has

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    async def call(self, method: str, *arguments: object) -> Any:
        """
        Raises:
            ActorDiedError: the process has ended.
        """
        self._run()
        if self._ended:
            raise self._died()
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._channel.send(number, Kind.CALL, (method, arguments))
        self._pending[number] = answer
        try:
            message = await answer
        except asyncio.CancelledError:
            self._channel.send(number, Kind.CANCEL)
            raise
        finally:
            del self._pending[number]
        return _content(message)

    async def stream(self, method: str, *arguments: object) -> AsyncGenerator[Any, None]:
        """As `call`, of an async generator."""
        self._run()
        if self._ended:
            raise self._died()
        number, arrived = next(self._numbers), asyncio.Queue[Message | None]()
        self._channel.send(number, Kind.CALL, (method, arguments))
        self._streams[number] = arrived
        is_running = True
        try:
            while (message := await arrived.get()) is not None:
                if message.kind is not Kind.PART:
                    is_running = False
                    _content(message)
                    return
                yield message.load()
            is_running = False
            raise self._died()
        finally:
            del self._streams[number]
            if is_running:
                self._channel.send(number, Kind.CANCEL)

    async def close(self) -> None:
        self._run()
        self._channel.send(0, Kind.CLOSE)
        await self._exit(CLOSE_S)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self) -> None:
        """Read and write, from the first call on: the constructor runs before the event loop."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._channel.write()), asyncio.create_task(self._read())]

    async def _read(self) -> None:
        try:
            while True:
                message = await self._channel.receive()
                if message.number in self._streams:
                    self._streams[message.number].put_nowait(message)
                answer = self._pending.get(message.number)
                if answer is not None and not answer.done():  # else it was cancelled
                    answer.set_result(message)
        except EOFError:
            self._ended = describe_exit(await self._exit(GONE_S))
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(self._died())
        for arrived in self._streams.values():
            arrived.put_nowait(None)
        self._tasks[0].cancel()
        self._channel.close()

    async def _exit(self, timeout_s: float) -> int:
        """Exit code, once the process has ended; it is killed after the timeout."""
        deadline = time.monotonic() + timeout_s
        while (code := self._process.poll()) is None:
            if time.monotonic() > deadline:
                self._process.kill()
            await asyncio.sleep(POLL_S)
        return code

    def _died(self) -> ActorDiedError:
        return ActorDiedError(
            f"{self._name}: its host process {self.pid}, which starts the engine, ended: {self._ended}"
        )


def _content(message: Message) -> Any:  # what the body returned
    """The content of an answer. Raises the exception of the body."""
    if message.kind is Kind.CANCELLED:
        raise asyncio.CancelledError
    content = message.load()
    if message.kind is Kind.ERROR:
        assert isinstance(content, Raised)
        raise unpack(content)
    return content
