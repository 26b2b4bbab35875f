"""A call in a fork of this process, while this process goes on: its imports take another core, and no memory here.

Not a pool of concurrent.futures, which keeps threads in a driver that starts other processes. The kernel ends the fork
with the driver.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Generic, TypeVar

from rlsys.sampler.vllm.parent_process import end_with

T = TypeVar("T")


class Meanwhile(Generic[T]):
    """Begins the call. Construct it in the main thread of a process that has no other thread."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._answer, theirs = os.pipe()
        here = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            try:
                end_with(here)
                os.close(self._answer)
                _answer(theirs, call)
            finally:
                os._exit(0)
        os.close(theirs)

    def result(self) -> T:
        """What the call returned; raises what it raised. A call whose fork ended without an answer, or has one that
        cannot be sent, is repeated here."""
        with open(self._answer, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(self._child, 0)
        if not answer:
            return self._call()
        returned, value = pickle.loads(answer)
        if not returned:
            raise value
        result: T = value
        return result


def _answer(pipe: int, call: Callable[[], T]) -> None:
    try:
        answer: tuple[bool, T | Exception] = (True, call())
    except Exception as error:
        answer = (False, error)
    with open(pipe, "wb") as file:
        file.write(pickle.dumps(answer))
