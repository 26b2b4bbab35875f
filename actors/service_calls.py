"""Answers of actors as futures of this process, with what went wrong as one readable error."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlsys.errors import ActorFailedError, RlsysError

T = TypeVar("T")


def future_of(ref: ray.ObjectRef, what: str) -> Future[Any]:
    """The value behind a reference. `what` names who does what, for the message."""
    answer: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        else:
            answer.set_exception(as_raised(error, what))

    ref.future().add_done_callback(settle)
    return answer


def together(parts: Sequence[Future[Any]], whole: Future[T], value: T) -> None:
    """Settle `whole` with `value` once all parts are done, or with the first error among them."""
    lock, left = threading.Lock(), [len(parts)]

    def settle(part: Future[Any]) -> None:
        error = part.exception()
        with lock:
            left[0] -= 1
            if whole.done():
                return
            if error is not None:
                whole.set_exception(error)
            elif not left[0]:
                whole.set_result(value)

    for part in parts:
        part.add_done_callback(settle)


def as_raised(error: BaseException, what: str) -> BaseException:
    """The error that an actor raised, as it raised it; ActorFailedError for what is from outside rlsys."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, RlsysError):
            return error.cause
        return ActorFailedError(f"{what}: {type(error.cause).__name__}: {error.cause}\n{str(error).rstrip()}")
    if isinstance(error, RayActorError):
        return ActorFailedError(f"{what}: the actor is gone: {_first_lines(error)}")
    if isinstance(error, RayError):
        return ActorFailedError(f"{what}: {type(error).__name__}: {_first_lines(error)}")
    return error


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])
