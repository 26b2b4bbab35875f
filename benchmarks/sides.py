"""Runs the sides of a benchmark as separate processes that alternate, one step per turn.

The benchmark starts a `Side` with a command, and gives it turns. The command's process holds the other end, a `Turn`,
and blocks in `wait` until its turn. The process that makes the step measures its time.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

QUIET_S = 0.1  # a side is at rest when its processes use less than half a core for so long
REST_LIMIT_S = 5.0


class Side:
    """One side, as seen by the benchmark."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        go_read, self._go = os.pipe()
        self._said, said_write = os.pipe()
        self.name, self.log = name, log
        self.turns: list[dict[str, Any]] = []
        ends = {"TURN_GO_FD": str(go_read), "TURN_SAID_FD": str(said_write)}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **env, **ends}, pass_fds=(go_read, said_write)
            )
        os.close(go_read)
        os.close(said_write)
        self._lines = os.fdopen(self._said)

    def ready(self) -> None:
        self._next()

    def step(self) -> float:
        """Seconds of one step; what the process said about it and what its processes used is kept in `turns`."""
        before = self._cpu_s()
        os.write(self._go, b"\n")
        said = self._next()
        used = self._cpu_s()
        self._rest()
        self.turns.append({**said, "cpu_s": used - before, "cpu_after_s": self._cpu_s() - used})
        return float(said["seconds"])

    def close(self) -> None:
        """The process gets the end of its last turn and leaves; it is given time for that."""
        os.close(self._go)
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._lines.close()

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early; its output:\n{self.log.read_text()[-4000:]}")
        said: dict[str, Any] = json.loads(line)
        return said

    def _cpu_s(self) -> float:
        top = psutil.Process(self.process.pid)
        total = 0.0
        for process in (top, *top.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def _rest(self) -> None:
        """Until what the step left running (records, threads that spin) is over: the other side has the cores."""
        limit = time.monotonic() + REST_LIMIT_S
        before = self._cpu_s()
        while time.monotonic() < limit:
            time.sleep(QUIET_S)
            now = self._cpu_s()
            if now - before < QUIET_S / 2:
                return
            before = now


class Turn:
    """The end in the side's process."""

    def __init__(self) -> None:
        self._go = os.fdopen(int(os.environ["TURN_GO_FD"]))
        self._said = os.fdopen(int(os.environ["TURN_SAID_FD"]), "w")
        self._began: float | None = None

    def over(self, **facts: float) -> None:
        """Say how long the step took that began with the last turn; the first call says that all is ready."""
        seconds = None if self._began is None else time.perf_counter() - self._began
        print(json.dumps({"seconds": seconds, **facts}), file=self._said, flush=True)

    def wait(self) -> None:
        """Until the next turn."""
        if not self._go.readline():
            raise KeyboardInterrupt  # the benchmark is gone
        self._began = time.perf_counter()
