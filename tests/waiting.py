"""Waits for tests that judge progress, not seconds: a loaded machine is slow, which is no failure.

A wait fails when none of its signs has changed for `STALL_S`. A sign is a number that changes while work moves: the CPU
time of a process and its children, the size of a log, a count of rows. `CAP_S` ends a wait whose signs change without
an end. A claim about speed compares with `slowdown()`, or with work that cannot end by itself.
"""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
STALL_S = 300.0
CAP_S = 1500.0  # of one wait; pytest's own limit of a test is longer
LOOK_S = 1.0  # between two looks at the signs; reading the process table takes CPU time itself
CPU_STEP_S = 10.0  # an idle Ray node polls: less CPU time than this within STALL_S is no work
# Ray starts its workers at nice 15: beside the work of others a test would only wait for its share of the cores. Every
# Ray that tests start has this in its environment. Not 0: what depends on that Ray lowers the priority shows in tests.
USUAL_PRIORITY = {"RAY_worker_niceness": "1"}
TOO_SLOW, UP_ATTEMPTS = "timed out during startup", 3  # Ray gives its own start 30 s, which a busy machine may exceed
FAR_S = 1e5  # a sleep that outlasts every wait: what ends before it was ended


@dataclass(frozen=True, slots=True)
class Sign:
    """A value that changes while the work moves."""

    name: str
    read: Callable[[], object]


class CpuTime:
    """CPU seconds of processes and all their descendants, those that have ended included, in whole steps."""

    def __init__(self, pids: Callable[[], Iterable[int]], step_s: float) -> None:
        self._pids, self._step_s = pids, step_s
        self._used: dict[tuple[int, float], float] = {}

    def __call__(self) -> float:
        for pid in self._pids():
            for process in family(pid):
                try:
                    times, begun = process.cpu_times(), process.create_time()
                except psutil.Error:
                    continue  # it has just ended
                key = (process.pid, begun)
                self._used[key] = max(self._used.get(key, 0.0), times.user + times.system)
        return sum(self._used.values()) // self._step_s * self._step_s


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants; of this process the descendants only, for waiting takes CPU time too."""
    try:
        process = psutil.Process(pid)
        below = process.children(recursive=True)
    except psutil.Error:
        return []
    return below if pid == os.getpid() else [process, *below]


def cpu_of(*pids: int, step_s: float = CPU_STEP_S) -> Sign:
    return cpu_of_all(lambda: pids, step_s)


def cpu_of_all(pids: Callable[[], Iterable[int]], step_s: float = CPU_STEP_S) -> Sign:
    """Of processes that may change while they are waited for."""
    return Sign("CPU seconds", CpuTime(pids, step_s))


def size_of(file: Path) -> Sign:
    return Sign(f"bytes of {file.name}", lambda: file.stat().st_size if file.exists() else 0)


class Patience:
    """Judges one wait. `look` is called often; it raises once nothing has advanced for `stall_s`."""

    def __init__(
        self,
        what: str,
        *signs: Sign,
        state: Callable[[], object] = str,
        stall_s: float = STALL_S,
        cap_s: float = CAP_S,
        look_s: float = LOOK_S,
    ) -> None:
        self.what, self.signs, self.state = what, signs, state
        self.stall_s, self.cap_s, self.look_s = stall_s, cap_s, look_s
        self._began = self._looked = time.monotonic()
        self._still_s = 0.0
        self._seen = self._read()

    def look(self) -> None:
        now = time.monotonic()
        if now - self._looked < self.look_s:
            return
        # A gap between two looks says that this process did not run, so it counts as no more than a few looks.
        self._still_s += min(now - self._looked, 5 * self.look_s)
        self._looked = now
        seen = self._read()
        if seen != self._seen:
            self._seen, self._still_s = seen, 0.0
        if self._still_s >= self.stall_s:
            raise self.failure(f"nothing advanced for {self.stall_s:g} s")
        if now - self._began >= self.cap_s:
            raise self.failure(f"not within {self.cap_s:g} s, though something advanced")

    def failure(self, why: str) -> AssertionError:
        waited = time.monotonic() - self._began
        signs = ", ".join(f"{sign.name} {value}" for sign, value in zip(self.signs, self._seen, strict=True))
        return AssertionError(f"waited {waited:.0f} s for {self.what}: {why} ({signs or 'no signs'})\n{self.state()}")

    def _read(self) -> list[object]:
        return [sign.read() for sign in self.signs]


def until(
    condition: Callable[[], T],
    what: str,
    *signs: Sign,
    process: subprocess.Popen[Any] | None = None,
    poll_s: float = 0.05,
    **limits: Any,
) -> T:
    """The first true value of `condition`. `process` brings it about: its CPU time is a sign, its end a failure."""
    patience = Patience(what, *signs, *([cpu_of(process.pid)] if process else []), **limits)
    while True:
        code = process.poll() if process else None  # before the condition, which its last act may have made true
        if value := condition():
            return value
        if code is not None:
            raise patience.failure(f"the process ended with exit code {code}")
        patience.look()
        time.sleep(poll_s)


async def until_async(condition: Callable[[], T], what: str, *signs: Sign, poll_s: float = 0.001, **limits: Any) -> T:
    """As `until`, for what happens on this event loop."""
    patience = Patience(what, *signs, **limits)
    while not (value := condition()):
        patience.look()
        await asyncio.sleep(poll_s)
    return value


def exit_code(process: subprocess.Popen[Any], what: str, *signs: Sign, **limits: Any) -> int:
    """Wait for the end of a process, which goes on while it uses CPU time or a sign changes."""
    until(lambda: process.poll() is not None, f"the end of {what}", *signs, cpu_of(process.pid), **limits)
    code: int = process.returncode
    return code


def until_gone(pids: Sequence[int], what: str, **limits: Any) -> None:
    """Until none of the processes is left; a zombie is gone."""
    left = lambda: [pid for pid in pids if is_alive(pid)]  # noqa: E731
    until(lambda: not left(), what, Sign("processes left", lambda: len(left())), cpu_of(*pids), state=left, **limits)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def run(
    command: Sequence[str], *, merged: bool = False, signs: Sequence[Sign] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with both outputs as text, stopped only where it stalls. `merged`: errors go to stdout."""
    limits = {name: options.pop(name) for name in ("stall_s", "cap_s", "look_s") if name in options}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        with out.open("w") as to_out, err.open("w") as to_err:
            process = subprocess.Popen(
                command, stdout=to_out, stderr=subprocess.STDOUT if merged else to_err, text=True, **options
            )
        state = lambda: out.read_text(errors="replace")[-3000:] + err.read_text(errors="replace")[-3000:]  # noqa: E731
        try:
            code = exit_code(
                process, " ".join(map(str, command)), size_of(out), size_of(err), *signs, state=state, **limits
            )
        finally:
            if process.poll() is None:
                for member in family(process.pid):
                    member.kill()
                process.wait()
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


@functools.cache
def times() -> int:
    """`slowdown()` when it was first asked for in this process, for limits that a loaded machine must not exceed."""
    return round(slowdown())


def slowdown(cpu_s: float = 0.2) -> float:
    """How many times longer than alone on this machine work takes now; at least 1."""
    work, began = time.thread_time(), time.monotonic()
    while (used := time.thread_time() - work) < cpu_s:
        pass
    return max(1.0, (time.monotonic() - began) / used)
