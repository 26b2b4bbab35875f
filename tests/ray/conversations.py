"""Environments that jobs of these tests name in `task.name`."""

from __future__ import annotations

import string
from collections.abc import Sequence

from rlsys.tasks.arithmetic import Arithmetic


class Interrupter(Arithmetic):
    """Answers any letter, twice: even a random model gets into conversations."""

    stop = tuple(string.ascii_letters)

    @staticmethod
    def reply(turns: Sequence[str], answer: str) -> str | None:
        return f"={len(turns)}+{answer}\n" if len(turns) < 3 else None


class Broken(Interrupter):
    @staticmethod
    def reply(turns: Sequence[str], answer: str) -> str | None:
        raise RuntimeError("the dice are gone")
