"""What the tests' host processes run."""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import setproctitle

from rlsys.config import TurnSection
from rlsys.environments.environment_pool import Environment
from rlsys.errors import SamplingError
from rlsys.types import Array
from tests.unit.environments.sample_environments import answering


class EngineDeadError(Exception):
    """As vLLM's: of a module that the actor does not import."""


EngineDeadError.__module__ = "vllm.v1.engine.exceptions"


class Picky(ValueError):
    """Pickled, and never restored."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Body:
    def __init__(self, name: str) -> None:
        self.name, self.log = name, list[str]()

    async def facts(self) -> dict[str, Any]:
        loaded = [name for name in ("ray", "torch", "vllm") if name in sys.modules]
        return {
            "name": self.name,
            "pid": os.getpid(),
            "threads": threading.active_count(),
            "tasks": len(os.listdir("/proc/self/task")),
            "loaded": loaded,
            "environment": os.environ.get("RLSYS_TEST_HOST"),
            "cores": sorted(os.sched_getaffinity(0)),
            "nice": os.nice(0),
            "output": [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)],
            "path": sys.path,
        }

    async def title_after_assigning(self, name: str, title: str) -> str:
        """What others see as this process's title."""
        assert next(iter(os.environ)) == name, "the first variable"
        os.environ[name] = "another value"
        setproctitle.setproctitle(title)
        return Path("/proc/self/cmdline").read_text().rstrip("\0")

    async def double(self, arrays: dict[str, Array]) -> dict[str, Array]:
        return {name: array * 2 for name, array in arrays.items()}

    async def echo(self, value: Any) -> Any:
        return value

    async def later(self, seconds: float, value: int) -> int:
        await asyncio.sleep(seconds)
        return value

    async def wait_until_cancelled(self) -> None:
        self.log.append("waits")
        try:
            await asyncio.sleep(1e5)
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise

    async def count(self, to: int, error: str | None = None) -> AsyncGenerator[int, None]:
        """`to` numbers, then an error of `fail`, or no end if it is "none"."""
        try:
            for number in range(to):
                yield number
            if error == "none":
                await asyncio.sleep(1e5)
            elif error is not None:
                await self.fail(error)
        finally:
            self.log.append(f"counted to {to}")

    async def cancel_itself(self) -> None:
        raise asyncio.CancelledError

    async def logged(self) -> list[str]:
        return self.log

    async def fail(self, kind: str) -> None:
        if kind == "ours":
            raise SamplingError("temperature: found -1")
        if kind == "caused":
            try:
                np.zeros(1)[3]
            except IndexError as error:
                raise SamplingError("nothing was started") from error
        if kind == "library":
            raise EngineDeadError("EngineCore encountered an issue")
        if kind == "picky":
            raise Picky(1, 2)
        raise OSError(28, "No space left on device")

    async def unpicklable(self) -> Any:
        return threading.Lock()

    async def delay_the_interpreters_end(self, seconds: float) -> None:
        atexit.register(time.sleep, seconds)

    async def fork(self) -> int:
        """A child that outlives its parent, as an engine that does not see it end."""
        if (child := os.fork()) == 0:
            signal.pause()
        return child

    async def converse(self) -> list[str]:
        """Replies of an environment whose processes are started here."""
        environment = Environment(TurnSection(workers=1), answering)
        environment.begin()
        try:
            return [(await environment.reply([turn], "")).text for turn in ("say hello", "say again")]
        finally:
            environment.close()

    async def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async def leave(self, code: int) -> None:
        os._exit(code)
