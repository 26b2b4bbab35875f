"""Runs a task's environment in a pool of processes and kills each call that exceeds its time limit.

The end of a conversation, a timeout and a failed call are three different outcomes. Timeouts and failures are faults of
the environment and are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from rlsys.config import TurnSection
from rlsys.sandbox.process_pool import Ending, Outcome, ProcessPool, Worker, pickled

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
        wanted = "a picklable task, or a task whose method `reply` is static"
        source = pickled(function, "task", "environment", wanted)
        self._worker = Worker("environment", pickle.loads, source, _text)  # trusted: this process pickled it
        self._preload = [__name__, function.__module__]
        self._answered = 0
        self._pool: ProcessPool[str | None] | None = None

    def begin(self) -> ProcessPool[str | None]:
        """Start the processes, so that they import the environment before the first call."""
        if self._pool is None:
            section = self._section
            self._pool = ProcessPool(self._worker, section.workers, section.reply_timeout_s, self._preload)
        return self._pool

    async def reply(self, turns: Sequence[str], answer: str) -> Reply:
        """Call the environment with the model's turns so far, oldest first, and the reference answer."""
        why, pool = "", self.begin()
        for _ in range(ATTEMPTS):
            call = pool.submit(list(turns), answer)
            with contextlib.suppress(Exception):  # `outcome` reads the error
                await asyncio.wrap_future(call)
            try:
                outcome = pool.outcome(call)
            except BrokenProcessPool as error:
                why = f"the environment processes died between two calls: {error}"
                continue
            why = outcome.why
            if outcome.ending is not Ending.KILLED:
                self._answered += 1
                return self._reply(outcome)
        self._answered += 1
        return Reply(ERROR, why=why)

    def progress(self) -> int:
        """Return the number of finished calls since the start, failed ones included."""
        return self._answered

    def close(self) -> None:
        """Kill all processes, including those in the middle of a call."""
        if self._pool is not None:
            self._pool.close()

    def _reply(self, outcome: Outcome[str | None]) -> Reply:
        if outcome.ending is Ending.VALUE:
            return Reply(OVER) if outcome.value is None else Reply(REPLIED, outcome.value)
        if outcome.ending is Ending.TIMEOUT:
            limit_s = self._section.reply_timeout_s
            return Reply(TIMEOUT, why=f"no reply within turns.reply_timeout_s = {limit_s:g} s")
        return Reply(ERROR, why=outcome.why)


def _text(reply: object) -> str | None:
    """The environment's reply, checked in its process."""
    if reply is None:
        return None
    if not isinstance(reply, str):
        raise TypeError(
            f"the environment replied {reply!r:.200} of type {type(reply).__name__}; wanted a string or None"
        )
    if len(reply) > MAX_REPLY_CHARACTERS:
        raise ValueError(f"the environment's reply has {len(reply)} characters; wanted at most {MAX_REPLY_CHARACTERS}")
    return reply.encode("utf-8", "replace").decode()  # replaces unpaired surrogates, which no tokenizer can encode
