"""Converts Ray object references to concurrent.futures.Future, with Ray's errors converted to RlsysError."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from actors.faults.actor_calls import as_raised

T = TypeVar("T")
Part = TypeVar("Part")


def future_of(ref: ray.ObjectRef, what: str) -> Future[Any]:
    """A future of the referenced value. `what` names the actor and its work, for error messages. Cancelling the future
    cancels the call: an async actor's coroutine is cancelled.

    Any: handles of actors know no types, so a reference has none; callers declare it.
    """
    answer: Future[Any] = Future()

    def settle(done: Future[object]) -> None:
        if not answer.set_running_or_notify_cancel():  # cancelled meanwhile
            return
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        else:
            answer.set_exception(as_raised(error, what) if isinstance(error, RayError) else error)

    def cancel(done: Future[object]) -> None:
        if done.cancelled() and ray.is_initialized():  # else it would be by this call
            ray.cancel(ref)

    answer.add_done_callback(cancel)
    ref.future().add_done_callback(settle)
    return answer


def failed(error: BaseException) -> Future[Any]:
    answer: Future[Any] = Future()
    answer.set_exception(error)
    return answer


def follow(
    first: Future[Part],
    begin: Callable[[Part], Future[T]],
    on_error: Callable[[Future[Part]], Future[T]] | None = None,
) -> Future[T]:
    """The future that `begin` makes of the result of `first`. `on_error` makes it of a `first` that failed. Cancelling
    it cancels what is under way."""
    answer: Future[T] = Future()
    current: list[Future[Any]] = [first]

    def pass_on(done: Future[T]) -> None:
        if done.cancelled():
            answer.cancel()
            return
        if not answer.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        else:
            answer.set_exception(error)

    def go_on(done: Future[Part]) -> None:
        if answer.cancelled():
            return
        try:
            if done.exception() is None:
                following = begin(done.result())
            elif on_error is not None:
                following = on_error(done)
            else:
                following = failed(done.exception() or RuntimeError())
        except BaseException as error:  # edge of a callback: the error belongs to the holder of the future
            following = failed(error)
        current[0] = following
        following.add_done_callback(pass_on)

    def cancel(done: Future[T]) -> None:
        if done.cancelled():
            current[0].cancel()

    answer.add_done_callback(cancel)
    first.add_done_callback(go_on)
    return answer


def gathered(parts: Sequence[Future[Any]], combine: Callable[..., T]) -> Future[T]:
    """A future of `combine` of the parts' results, or of the first error among them. Any: parts differ in type."""
    combined: Future[T] = Future()
    all_done: Future[None] = Future()

    def settle(done: Future[None]) -> None:
        if not combined.set_running_or_notify_cancel():
            return
        try:
            done.result()
            combined.set_result(combine(*(part.result() for part in parts)))
        except BaseException as error:  # edge of a callback: the error belongs to the holder of the future
            combined.set_exception(error)

    together(parts, all_done, None)
    all_done.add_done_callback(settle)
    return combined


async def values_of(refs: ray.ObjectRefGenerator, what: str) -> AsyncGenerator[Any, None]:
    """Values of an actor's async generator, as it yields them; errors as `future_of` has them. Closing this generator
    cancels that one."""
    is_running = True
    try:
        async for ref in refs:
            yield await ref
        is_running = False
    except RayError as error:
        is_running = False
        raise as_raised(error, what) from None
    finally:
        if is_running:
            ray.cancel(refs)


def together(parts: Sequence[Future[Part]], combined: Future[T], value: T) -> None:
    """Set the result of `combined` to `value` when all `parts` are done, or set the first error among them."""
    lock, pending = threading.Lock(), [len(parts)]

    def settle(part: Future[Part]) -> None:
        error = part.exception()
        with lock:
            pending[0] -= 1
            if combined.done():
                return
            if error is not None:
                combined.set_exception(error)
            elif not pending[0]:
                combined.set_result(value)

    for part in parts:
        part.add_done_callback(settle)
