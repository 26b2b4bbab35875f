"""An environment answers the model from processes of its own, each call killed when its time is up.

That a conversation is over, that a reply took too long and that it failed are three different outcomes: the first is a
fact about the conversation, the others are faults of the environment, and they are counted.
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

Replier = Callable[[Sequence[str], str], "str | None"]  # the model's turns and the problem's answer -> the reply

MAX_REPLY_CHARACTERS = 100_000  # more is no reply that a model could read, and would hold up who makes tokens of it
ATTEMPTS = 3  # of a call whose process was killed from outside, or whose pool broke between two calls


@dataclass(frozen=True, slots=True)
class Reply:
    """`text` is "" unless there is a reply; `why` is "" unless there should have been one."""

    outcome: int
    text: str = ""
    why: str = ""


class Environment:
    """`section.workers` processes that call `function`, which has to be picklable. All methods on one event loop."""

    def __init__(self, section: TurnSection, function: Replier) -> None:
        self._section = section
        try:
            self._function = pickle.dumps(function)
        except Exception as error:  # pickling runs the object's own code
            raise ConfigError(
                f"task: {function!r} cannot be sent to the processes that reply ({error}); wanted a task that can be "
                "pickled, or whose reply is a static method"
            ) from error
        self._context = multiprocessing.get_context("forkserver")  # fork would copy the locks of this process' threads
        self._context.set_forkserver_preload([__name__, function.__module__])
        self._answered = 0
        self._pool = self._start()

    async def reply(self, turns: Sequence[str], answer: str) -> Reply:
        """To the model's turns so far."""
        why = ""
        for _ in range(ATTEMPTS):
            try:
                text, failure = await asyncio.wrap_future(self._submit(turns, answer))
                self._answered += 1
                if failure:
                    return Reply(ERROR, why=failure)
                return Reply(OVER) if text is None else Reply(REPLIED, text)
            except BrokenProcessPool as error:
                why = f"the processes that reply died between two replies: {error}"
            except ProcessExpired as error:
                why = f"the process that replies died: {describe_exit(error.exitcode)}"
                if error.exitcode != -signal.SIGKILL:  # else from outside, it seems, and not the conversation's fault
                    break
            except TimeoutError:
                self._answered += 1
                return Reply(
                    TIMEOUT, why=f"no reply within turns.reply_timeout_s = {self._section.reply_timeout_s:g} s"
                )
        self._answered += 1
        return Reply(ERROR, why=why)

    def progress(self) -> int:
        """Replies that have come to an end since the start, however."""
        return self._answered

    def close(self) -> None:
        """Kill the processes, whatever they do."""
        self._pool.stop()
        while True:
            try:
                self._pool.join()
                return
            except KeyError:  # pebble's own thread took away a process that it was about to stop; others may be left
                continue

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            self._section.workers, initializer=_initialise, initargs=(self._function,), context=self._context
        )
        assert pool.active  # asking starts the processes: they import while the engine starts
        return pool

    def _submit(self, turns: Sequence[str], answer: str) -> Future[_Answer]:
        if not self._pool.active:
            self.close()
            self._pool = self._start()
        timeout = self._section.reply_timeout_s
        call: Future[_Answer] = self._pool.schedule(_reply_once, (list(turns), answer), timeout=timeout)
        return call


_Answer = tuple["str | None", str]  # reply, and the text of the exception if there was one
_function: Replier | None = None  # of this process
_start_error = ""


def _initialise(function: bytes) -> None:
    """Runs once in each process; one that cannot load its environment lives on to say so."""
    global _function, _start_error
    init_killable_process()
    try:
        _function = pickle.loads(function)  # our owner pickled it
    except Exception:  # an import of the user's may raise anything
        _start_error = traceback.format_exc()[-TEXT_TAIL:]


def _reply_once(turns: list[str], answer: str) -> _Answer:
    """Failures come back as text: not every exception survives pickling."""
    if _function is None:
        return None, f"the environment could not be loaded: {_start_error}"
    try:
        return _text(_function(turns, answer)), ""
    except BaseException:  # also SystemExit, and what libraries derive from BaseException
        return None, traceback.format_exc()[-TEXT_TAIL:]


def _text(reply: object) -> str | None:
    if reply is None:
        return None
    if not isinstance(reply, str):
        raise TypeError(f"the environment replied {reply!r:.200} of type {type(reply).__name__}; wanted a text or None")
    if len(reply) > MAX_REPLY_CHARACTERS:
        raise ValueError(f"the environment replied {len(reply)} characters; wanted at most {MAX_REPLY_CHARACTERS}")
    return reply.encode("utf-8", "replace").decode()  # half a surrogate pair is no token's text
