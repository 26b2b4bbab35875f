"""Futures that follow each other."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future

import pytest

from actors.service.call_futures import failed, follow, gathered
from rlsys.errors import ActorDiedError


def done(value: int) -> Future[int]:
    answer: Future[int] = Future()
    answer.set_result(value)
    return answer


def test_a_future_begins_when_the_one_before_it_is_done() -> None:
    first, second = Future[int](), Future[int]()
    begun: list[int] = []

    def begin(value: int) -> Future[int]:
        begun.append(value)
        return second

    answer = follow(first, begin)
    assert not begun
    first.set_result(3)
    assert begun == [3] and not answer.done()
    second.set_result(4)
    assert answer.result(0) == 4


def test_a_failure_is_passed_on_or_replaced() -> None:
    with pytest.raises(ActorDiedError, match="gone"):
        follow(failed(ActorDiedError("gone")), done).result(0)
    assert follow(failed(ActorDiedError("gone")), done, lambda _: done(7)).result(0) == 7

    def breaks(value: int) -> Future[int]:
        raise ZeroDivisionError(str(value))

    with pytest.raises(ZeroDivisionError, match="5"):
        follow(done(5), breaks).result(0)


@pytest.mark.parametrize("has_begun", [False, True])
def test_cancelling_cancels_what_is_under_way(has_begun: bool) -> None:
    first, second = Future[int](), Future[int]()
    answer = follow(first, lambda _: second)
    if has_begun:
        first.set_result(1)
    answer.cancel()
    assert first.cancelled() != has_begun and second.cancelled() == has_begun
    with pytest.raises(CancelledError):
        answer.result(0)


def test_results_are_gathered_or_the_first_failure_is() -> None:
    one, two = Future[int](), Future[int]()
    both = gathered([one, two], lambda a, b: a - b)
    two.set_result(1)
    assert not both.done()
    one.set_result(5)
    assert both.result(0) == 4
    with pytest.raises(ActorDiedError):
        gathered([done(1), failed(ActorDiedError("gone"))], max).result(0)
