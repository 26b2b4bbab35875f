"""Order of one model's calls: by number, whatever the order of arrival; each number once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rlsys.serve.promises import Clock

FIRST = 1  # the first number that a client uses
MAX_AHEAD = 10_000  # how far a number may be ahead of the next one: clients send a few hundred calls at once


@dataclass(frozen=True, slots=True)
class Call:
    """A call that waits for its turn. `start` begins it and returns at once; `fail` settles it with an error's text."""

    request_id: str
    start: Callable[[], object]
    fail: Callable[[str], object]
    is_pass: bool = False  # of a batch, of which a step takes the sum


class ModelQueue:
    """Starts calls in the order of their numbers, as soon as all smaller numbers are started or used up.

    A gap exists while a higher number waits. If it stays open for `gap_s` after the model's last arrival, the lowest
    waiting call fails, and the numbers before it are closed: they will never run.
    """

    def __init__(
        self,
        gap_s: float,
        clock: Clock = time.monotonic,
        first: int = FIRST,
        advanced: Callable[[int], object] = lambda _: None,
    ) -> None:
        """`first`: the smallest number that is not used up. `advanced` gets the next such number before a call begins
        and after numbers are used up."""
        self._gap_s, self._clock, self._advanced = gap_s, clock, advanced
        self._next = first
        self._waiting: dict[int, Call] = {}
        self._entered: dict[int, str] = {}  # number -> request id
        self._refused: dict[int, str] = {}  # number -> why
        self._closed: list[tuple[range, str]] = []  # numbers that never arrived, and why
        self._last_arrival = clock()
        self.lost_passes = 0  # passes that were refused or never arrived, since the caller last set it to 0

    @property
    def next(self) -> int:
        return self._next

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def remember(self, seq: int, request_id: str) -> None:
        """A call of an earlier process: its number is used up, and a repeated request gets its promise."""
        self._entered[seq] = request_id

    def use_up_to(self, seq: int) -> None:
        """Numbers up to `seq` that are not waiting are used up."""
        if seq >= self._next:
            self._next = seq + 1
            self._advanced(self._next)

    def request_of(self, seq: int) -> str | None:
        """Request id of the call that has this number."""
        return self._entered.get(seq)

    def refusal_of(self, seq: int) -> str | None:
        """Why the call of this number was refused."""
        return self._refused.get(seq)

    def closed(self, seq: int) -> str | None:
        """Why the call of this number will never run."""
        return next((why for numbers, why in self._closed if seq in numbers), None)

    def enter(self, seq: int, call: Call) -> None:
        """Enter a call whose number is new; see `request_of`."""
        assert seq not in self._entered and FIRST <= seq < self._next + MAX_AHEAD
        self._last_arrival = self._clock()
        self._entered[seq] = call.request_id
        if seq < self._next:  # a gap that is closed, or a number that was used up
            call.fail(self.closed(seq) or f"call {seq}: its number was used up before")
            return
        self._waiting[seq] = call
        self._start()

    def refuse(self, seq: int, why: str, is_pass: bool = False) -> None:
        """Use up the number of a call that was refused."""
        self._last_arrival = self._clock()
        if seq in self._entered or seq in self._refused or not self._next <= seq < self._next + MAX_AHEAD:
            return
        self._refused[seq] = why
        self.lost_passes += is_pass
        self._start()

    def close_overdue(self) -> None:
        """Close the gap before the lowest waiting call if its time is over."""
        if not self._waiting or self._clock() - self._last_arrival <= self._gap_s:
            return
        lowest = min(self._waiting)
        call = self._waiting.pop(lowest)
        missing = range(self._next, lowest)
        names = f"call {missing[0]}" if len(missing) == 1 else f"calls {missing[0]} to {missing[-1]}"
        why = f"{names} of this model never arrived: its client gave up; reload the last checkpoint"
        self._closed.append((missing, why))
        self.lost_passes += len(missing) + call.is_pass
        self._next = lowest + 1
        self._advanced(self._next)
        self._last_arrival = self._clock()  # the next gap gets its time
        call.fail(why)
        self._start()

    def abandon(self, why: str) -> None:
        """Fail all calls that wait."""
        waiting, self._waiting = self._waiting, {}
        for _, call in sorted(waiting.items()):
            call.fail(why)

    def _start(self) -> None:
        while True:
            if self._next in self._refused:
                self._next += 1
                self._advanced(self._next)
                continue
            call = self._waiting.pop(self._next, None)
            if call is None:
                return
            self._next += 1
            self._advanced(self._next)
            call.start()
