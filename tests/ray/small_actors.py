"""Actors that work, stick, fail and die; in a module of their own, so that a worker has little to import."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import ray

from rlsys.errors import GradingError


class Worker:
    """Threaded: one thread works, the other tells of progress."""

    def __init__(self, fails: bool = False) -> None:
        if fails:
            raise LookupError("no such base")
        self.steps = 0

    def progress(self) -> int:
        return self.steps

    def work(self, steps: int, pause_s: float) -> int:
        for _ in range(steps):
            time.sleep(pause_s)
            self.steps += 1
        return self.steps

    def stick(self) -> None:
        print("entering the long sleep", file=sys.stderr, flush=True)
        time.sleep(3600)

    def bad(self) -> None:
        raise ValueError("bad thing\nwith a second line")

    def refuse(self) -> None:
        raise GradingError("graders: all of them failed")

    def take(self, what: Any) -> Any:
        return what

    def own(self) -> list[Any]:
        """A reference to what is lost with this actor."""
        return [ray.put(bytes(2**20))]

    def die(self) -> None:
        print("these were my last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class Loop:
    """Async, with its one loop blocked: not even progress is answered."""

    async def progress(self) -> int:
        return 0

    async def stick(self) -> None:
        time.sleep(3600)
