"""Passes that pause at micro-batch borders, so that passes of other runs can be executed in between."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from rlsys.distributed.ranks import Ranks

Result = TypeVar("Result")
Turns = Generator[int, None, Result]  # yields the tokens of each finished micro-batch, and returns the pass's result


def finish(turns: Turns[Result]) -> Result:
    """Execute a pass to its end."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            result: Result = end.value
            return result


def preceded(prepare: Callable[[], None], turns: Turns[Result]) -> Turns[Result]:
    """The same pass with `prepare` called before each turn."""
    try:
        while True:
            prepare()
            try:
                tokens = next(turns)
            except StopIteration as end:
                result: Result = end.value
                return result
            yield tokens
    finally:
        turns.close()


class DeferredFailure:
    """The failure of a rank's share, kept until the pass ends: all ranks take equally many turns, and meet in the sum
    after the last one.

    A single rank fails at once. So do ranks that share a base, whose forward passes communicate.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._defers = ranks.size > 1 and not ranks.shards
        self._error: Exception | None = None

    def attempt(self, work: Callable[[], None]) -> None:
        """Call `work`, unless something failed before."""
        if self._error is not None:
            return
        try:
            work()
        except Exception as error:
            if not self._defers:
                raise
            self._error = error

    def raise_deferred(self) -> None:
        if self._error is not None:
            raise self._error
