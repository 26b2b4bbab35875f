"""Ctrl-C, SIGTERM and SIGHUP: the first lets the step in flight finish, the second stops at once.

A terminal that is closed often sends SIGHUP twice (its shell and the kernel both do), so a second one asks for nothing.
"""

from __future__ import annotations

import os
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
        self._hung_up = False

    @contextmanager
    def watched(self) -> Iterator[Interrupts]:
        """Handle the signals until the block ends."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which is how nohup asks to go on
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
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
        if number == signal.SIGHUP:
            _leave_terminal()
            if self._hung_up:
                return
            self._hung_up = True
        if self.requested or not self._patient:
            raise KeyboardInterrupt
        self.requested = True
        self.note("stopping after the step in flight; interrupt again to drop it and stop now")


def _leave_terminal() -> None:
    """Writing to a terminal that hung up fails, and what ends a run has things to say: from now on to nobody."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
