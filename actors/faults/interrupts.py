"""Handles Ctrl-C, SIGTERM and SIGHUP: the first signal stops after the current step, the second stops at once.

A closed terminal often sends SIGHUP twice (from the shell and from the kernel), so a second SIGHUP is ignored.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Outside of `between_steps` a signal raises KeyboardInterrupt at once, because there is no step to finish."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self.requested = False
        self._patient = False
        self._hung_up = False

    @contextmanager
    def watched(self) -> Iterator[Interrupts]:
        """Handle the signals until the block ends."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores SIGHUP: keep running
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def between_steps(self) -> Iterator[Callable[[], bool]]:
        """Yields a function that the loop calls before each step: whether a stop was requested."""
        self._patient = True
        try:
            yield lambda: self.requested
        finally:
            self._patient = False

    def request(self) -> str:
        """Request a stop without a signal, with the effect of the first one. Returns the answer for the user."""
        self.requested = True
        return "stopping after the current step"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
            if self._hung_up:
                return
            self._hung_up = True
        if self.requested or not self._patient:
            raise KeyboardInterrupt
        self.requested = True
        self.note("stopping after the current step; interrupt again to discard the step and stop now")


def _leave_terminal() -> None:
    """Redirect stdout and stderr to /dev/null if the terminal is gone: a failed write would stop the shutdown."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
