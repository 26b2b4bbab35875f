"""A call in a fork of this process, while this process goes on: its imports take another core, and no memory here.

Not a pool of concurrent.futures, which keeps threads in a driver that starts other processes. The kernel ends the fork
with the driver.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
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
                send_answer(theirs, call)
            finally:
                os._exit(0)
        os.close(theirs)

    def result(self) -> T:
        """What the call returned; raises what it raised. A call whose fork ended without an answer, or has one that
        cannot be sent, is repeated here."""
        try:
            return answer_of(self._answer, self._call)
        finally:
            os.waitpid(self._child, 0)


def send_answer(pipe: int, call: Callable[[], object]) -> None:
    """Make the call, and send what it returns or raises; the pipe is closed."""
    try:
        answer: tuple[bool, object] = (True, call())
    except Exception as error:
        answer = (False, error)
    with open(pipe, "wb") as file:
        file.write(pickle.dumps(answer))


def answer_of(pipe: int, call: Callable[[], T]) -> T:
    """What `send_answer` sent to the other end; without that the call is made here."""
    answer = b""
    with open(pipe, "rb") as file, suppress(ConnectionResetError):  # of a socket whose other end has not read all
        answer = file.read()
    if not answer:
        return call()
    returned, value = pickle.loads(answer)
    if not returned:
        raise value
    result: T = value
    return result
