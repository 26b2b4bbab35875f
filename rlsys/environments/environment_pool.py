"""Runs a task's environment in a pool of processes and kills each call that exceeds its time limit.

The end of a conversation, a timeout and a failed call are three different outcomes. Timeouts and failures are faults of
the environment and are counted.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from pebble import ProcessExpired, ProcessPool

from rlsys.config import TurnSection
from rlsys.errors import ConfigError
from rlsys.sandbox.killable_process import TEXT_TAIL, describe_exit, init_killable_process

REPLIED, OVER, TIMEOUT, ERROR = 0, 1, 2, 3  # values of Reply.outcome

Replier = Callable[[Sequence[str], str], "str | None"]  # (the model's turns, reference answer) -> reply

MAX_REPLY_CHARACTERS = 100_000  # a longer reply would exceed any context length and block the tokenizer
ATTEMPTS = 3  # for a call whose process was killed by another process, or whose pool broke between two calls


@dataclass(frozen=True, slots=True)
class Reply:
    """Outcome of one call."""

    outcome: int  # REPLIED, OVER, TIMEOUT or ERROR
    text: str = ""  # the reply, if REPLIED
    why: str = ""  # the error text, if TIMEOUT or ERROR


class Environment:
    """Pool of `section.workers` processes that call the picklable `function`. They start with `begin` or the first
    call. Use all methods on one event loop."""

    def __init__(self, section: TurnSection, function: Replier) -> None:
        self._section = section
        try:
            self._function = pickle.dumps(function)
        except Exception as error:  # pickling runs user code
            raise ConfigError(
                f"task: {function!r} cannot be sent to the environment processes ({error}); wanted a picklable task, "
                "or a task whose method `reply` is static"
            ) from error
        self._context = multiprocessing.get_context("forkserver")  # fork would copy locks held by other threads
        self._context.set_forkserver_preload([__name__, function.__module__])
        self._answered = 0
        self._pool: ProcessPool | None = None

    def begin(self) -> None:
        """Start the processes, so that they import the environment before the first call."""
        self._pool = self._start()

    async def reply(self, turns: Sequence[str], answer: str) -> Reply:
        """Call the environment with the model's turns so far, oldest first, and the reference answer."""
        why = ""
        for _ in range(ATTEMPTS):
            try:
                text, failure = await asyncio.wrap_future(self._submit(turns, answer))
                self._answered += 1
                if failure:
                    return Reply(ERROR, why=failure)
                return Reply(OVER) if text is None else Reply(REPLIED, text)
            except BrokenProcessPool as error:
                why = f"the environment processes died between two calls: {error}"
            except ProcessExpired as error:
                why = f"the environment process died: {describe_exit(error.exitcode)}"
                if error.exitcode != -signal.SIGKILL:  # SIGKILL probably came from outside, such as the OOM killer
                    break
            except TimeoutError:
                self._answered += 1
                return Reply(
                    TIMEOUT, why=f"no reply within turns.reply_timeout_s = {self._section.reply_timeout_s:g} s"
                )
        self._answered += 1
        return Reply(ERROR, why=why)

    def progress(self) -> int:
        """Return the number of finished calls since the start, failed ones included."""
        return self._answered

    def close(self) -> None:
        """Kill all processes, including those in the middle of a call."""
        if self._pool is None:
            return
        self._pool.stop()
        while True:
            try:
                self._pool.join()
                return
            except KeyError:  # a race in pebble: its thread removed a process during join; other processes may remain
                continue

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            self._section.workers, initializer=_initialise, initargs=(self._function,), context=self._context
        )
        assert pool.active  # reading `active` starts the processes
        return pool

    def _submit(self, turns: Sequence[str], answer: str) -> Future[_Answer]:
        if self._pool is None or not self._pool.active:
            self.close()
            self._pool = self._start()
        timeout = self._section.reply_timeout_s
        call: Future[_Answer] = self._pool.schedule(_reply_once, (list(turns), answer), timeout=timeout)
        return call


_Answer = tuple["str | None", str]  # reply, and the traceback if the call failed, else ""
_function: Replier | None = None  # the environment of this process
_start_error = ""


def _initialise(function: bytes) -> None:
    """Load the environment, once per process. If that fails, the process keeps running and calls return the error."""
    global _function, _start_error
    init_killable_process()
    try:
        _function = pickle.loads(function)  # trusted: the parent pickled it
    except Exception:  # importing user code may raise any type
        _start_error = traceback.format_exc()[-TEXT_TAIL:]


def _reply_once(turns: list[str], answer: str) -> _Answer:
    """Call the environment. Errors are returned as text: not every exception can be pickled."""
    if _function is None:
        return None, f"the environment could not be loaded: {_start_error}"
    try:
        return _text(_function(turns, answer)), ""
    except BaseException:  # SystemExit too, and library errors derived from BaseException
        return None, traceback.format_exc()[-TEXT_TAIL:]


def _text(reply: object) -> str | None:
    if reply is None:
        return None
    if not isinstance(reply, str):
        raise TypeError(
            f"the environment replied {reply!r:.200} of type {type(reply).__name__}; wanted a string or None"
        )
    if len(reply) > MAX_REPLY_CHARACTERS:
        raise ValueError(f"the environment's reply has {len(reply)} characters; wanted at most {MAX_REPLY_CHARACTERS}")
    return reply.encode("utf-8", "replace").decode()  # replaces unpaired surrogates, which no tokenizer can encode
