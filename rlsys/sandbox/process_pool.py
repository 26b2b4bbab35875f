"""Pool of processes that call one function of a user, each call with a time limit. The processes can be killed.

A call ends in one of five ways: with a value, with the function's own fault, at its time limit, with the process, or
with a process that was killed from outside. A process that ended is replaced, and the other calls are not affected.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing import forkserver
from typing import Generic, TypeVar

import pebble

from rlsys.errors import ConfigError
from rlsys.sandbox.killable_process import describe_exit, init_killable_process

TEXT_TAIL = 2000  # last characters kept of a traceback

Value = TypeVar("Value")
Function = Callable[..., object]
Answer = tuple[Value | None, str]  # value, and the traceback if the call failed, else ""
Call = Future[Answer[Value]]


class Ending(Enum):
    VALUE = auto()
    FAULT = auto()  # the function raised, returned a wrong value, or could not be loaded
    TIMEOUT = auto()
    DIED = auto()  # the function ended its process
    KILLED = auto()  # SIGKILL, probably from outside, such as by the OOM killer: the call may be repeated


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Value]):
    """Outcome of one call. `why`: the error text of FAULT, DIED and KILLED."""

    ending: Ending
    value: Value | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Worker(Generic[Value]):
    """What each process of a pool does. All fields travel to the processes, so they must be picklable."""

    name: str  # in error messages: "grader" for "the grader process died"
    load: Callable[..., Function]  # called once per process with `source`; returns the function to call
    source: str | bytes
    check: Callable[[object], Value]  # of what the function returned; raises for a wrong value


class ProcessPool(Generic[Value]):
    """`workers` processes that load the worker's function once. Processes start at once and import in the background.

    `preload`: modules that the fork server imports once, so that a replacement of a killed process starts quickly.
    """

    def __init__(self, worker: Worker[Value], workers: int, timeout_s: float, preload: Sequence[str]) -> None:
        self._worker, self._workers, self._timeout_s = worker, workers, timeout_s
        self._context = multiprocessing.get_context("forkserver")  # fork would copy locks held by other threads
        begin_imports(preload)
        self._pool = self._start()

    def submit(self, *arguments: object) -> Call[Value]:
        """Queue one call; calls start in order. Restarts the processes first if the pool is broken."""
        if not self._pool.active:
            self.restart()
        call: Call[Value] = self._pool.schedule(_call, arguments, timeout=self._timeout_s)
        return call

    def outcome(self, call: Call[Value]) -> Outcome[Value]:
        """Outcome of a call that is done.

        Raises:
            BrokenProcessPool: the pool's only process died between two calls. The call may be submitted again.
        """
        error = call.exception(timeout=0)
        if error is None:
            value, why = call.result()
            return Outcome(Ending.FAULT, why=why) if why else Outcome(Ending.VALUE, value)
        if isinstance(error, BrokenProcessPool):
            raise error
        if isinstance(error, TimeoutError):
            return Outcome(Ending.TIMEOUT)
        if isinstance(error, pebble.ProcessExpired):
            ending = Ending.KILLED if error.exitcode == -signal.SIGKILL else Ending.DIED
            return Outcome(ending, why=f"the {self._worker.name} process died: {describe_exit(error.exitcode)}")
        raise error

    def restart(self) -> None:
        """Kill all processes, and start as many."""
        self.close()
        self._pool = self._start()

    def close(self) -> None:
        """Kill all processes, including those in the middle of a call."""
        self._pool.stop()
        while True:
            try:
                self._pool.join()
                return
            except KeyError:  # a race in pebble: its thread removed a process during join; other processes may remain
                continue

    def _start(self) -> pebble.ProcessPool:
        pool = pebble.ProcessPool(
            self._workers, initializer=_initialise, initargs=(self._worker,), context=self._context
        )
        assert pool.active  # reading `active` starts the processes: they import while the owner does other work
        return pool


def begin_imports(preload: Sequence[str]) -> None:
    """Start this process's fork server, which imports the modules, and return at once: a pool that is made later does
    not wait for them. It has no effect if there is one already."""
    multiprocessing.set_forkserver_preload([__name__, *preload])
    forkserver.ensure_running()


def pickled(function: Function, key: str, name: str, wanted: str) -> bytes:
    """The function for the processes of a pool; `key` and `wanted` are for the error.

    Raises:
        ConfigError: the function cannot be pickled.
    """
    try:
        return pickle.dumps(function)
    except Exception as error:  # pickling runs user code
        raise ConfigError(
            f"{key}: {function!r} cannot be sent to the {name} processes ({error}); wanted {wanted}"
        ) from error


_worker: Worker[object] | None = None  # of this process
_function: Function | None = None
_start_error = ""


def _initialise(worker: Worker[object]) -> None:
    """Load the function, once per process. If that fails, the process keeps running and each call returns the error."""
    global _worker, _function, _start_error
    init_killable_process()
    _worker = worker
    try:
        _function = worker.load(worker.source)
    except Exception:  # importing user code may raise any type
        _start_error = traceback.format_exc()[-TEXT_TAIL:]


def _call(*arguments: object) -> Answer[object]:
    """Call the function. Errors are returned as text: not every exception can be pickled."""
    assert _worker is not None
    if _function is None:
        return None, f"the {_worker.name} could not be loaded: {_start_error}"
    try:
        return _worker.check(_function(*arguments)), ""
    except BaseException:  # SystemExit too, and library errors derived from BaseException
        return None, traceback.format_exc()[-TEXT_TAIL:]
