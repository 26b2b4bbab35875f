"""Environments that the tests of rlsys.environments.environment_pool and rlsys.environments.multi_turn run in processes
of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

# What each does to a turn, by the turn's first word.


def answering(turns: Sequence[str], answer: str) -> Any:
    """Obeys the last turn: 'say X', 'count', 'answer', and what else goes wrong; anything else is the end."""
    order, _, rest = turns[-1].removesuffix(";").partition(" ")
    if order == "say":
        return rest
    if order == "count":
        return str(len(turns))
    if order == "answer":
        return answer
    if order == "sleep":
        time.sleep(1e5)
    if order == "raise":
        raise KeyError("lost the dice")
    if order == "leave":
        raise SystemExit(3)
    if order == "number":
        return 7
    if order == "flood":
        return "x" * 1_000_000
    if order == "surrogate":
        return "a\ud800b"
    if order == "hoard":
        return str(len(bytearray(64 * 2**30)))
    if order == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "exit":
        os._exit(4)
    if order == "pid":
        return str(os.getpid())
    return None


class Unpicklable:
    def __init__(self) -> None:
        self.handle = open(os.devnull)  # noqa: SIM115

    def reply(self, turns: Sequence[str], answer: str) -> str | None:
        return None


class Breaks:
    """Good until it arrives."""

    def reply(self, turns: Sequence[str], answer: str) -> str | None:
        return None

    def __setstate__(self, state: Any) -> None:
        raise ImportError("no dice here")

    def __getstate__(self) -> Any:
        return {"dice": 2}
