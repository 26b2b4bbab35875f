"""Answers of actors as futures of this process, with what went wrong as one readable error."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from actors.faults.actor_calls import as_raised

T = TypeVar("T")


def future_of(ref: ray.ObjectRef, what: str) -> Future[Any]:
    """The value behind a reference. `what` names who does what, for the message."""
    answer: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        else:
            answer.set_exception(as_raised(error, what) if isinstance(error, RayError) else error)

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
