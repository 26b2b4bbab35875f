"""Ctrl-C and SIGTERM: the first lets the step in flight finish, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Outside of `between_steps` a signal is a KeyboardInterrupt at once, since there is no step to finish."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self.requested = False
        self._patient = False

    @contextmanager
    def watched(self) -> Iterator[Interrupts]:
        """Handle the signals until the block ends."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def between_steps(self) -> Iterator[Callable[[], bool]]:
        """Yields what the loop asks before each step: was a stop requested?"""
        self._patient = True
        try:
            yield lambda: self.requested
        finally:
            self._patient = False

    def request(self) -> str:
        """As the first signal would, from elsewhere; what happens now, in words."""
        self.requested = True
        return "stopping after the step in flight"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._patient:
            raise KeyboardInterrupt
        self.requested = True
        self.note("stopping after the step in flight; interrupt again to drop it and stop now")
