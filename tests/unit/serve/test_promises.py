"""Promises: kept until they have surely arrived, and not longer."""

from __future__ import annotations

import asyncio

import pytest

from rlsys.serve.errors import Refusal
from rlsys.serve.promises import MemoryPromises, Promise
from rlsys.serve.wire.results import JsonResult


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def store(clock: Clock, max_bytes: int = 2**30) -> MemoryPromises:
    return MemoryPromises(result_s=300.0, undelivered_s=3600.0, max_bytes=max_bytes, clock=clock)


def polled(promises: MemoryPromises, promise: Promise) -> object:
    return asyncio.run(promises.wait(promise, 0.01))


def test_a_result_is_kept_for_five_minutes_after_the_last_poll() -> None:
    clock, result = Clock(), JsonResult({"a": 1})
    promises = store(clock)
    promise = promises.new("one", "session")
    assert polled(promises, promise) is None
    promises.settle(promise, result)
    for at in (250.0, 500.0, 750.0):
        clock.now = at
        promises.expire()
        assert polled(promises, promises.get(promise.id, "one")) is result
    clock.now = 1051.0
    promises.expire()
    with pytest.raises(Refusal, match="its result is not kept any more") as refused:
        promises.get(promise.id, "one")
    assert refused.value.status == 410 and len(promises) == promises.nbytes == 0


def test_a_result_that_nobody_has_asked_for_is_kept_longer_and_a_pending_one_always() -> None:
    clock = Clock()
    promises = store(clock)
    asked, pending = promises.new("one", "s"), promises.new("one", "s")
    promises.settle(asked, JsonResult({}))
    clock.now = 3599.0
    assert promises.expire() == 0
    clock.now = 3601.0
    assert promises.expire() == 1
    clock.now = 1e6
    promises.expire()
    assert promises.get(pending.id, "one") is pending


def test_beyond_the_memory_delivered_results_go_first_and_the_oldest_of_them() -> None:
    clock, size = Clock(), JsonResult({}).nbytes
    promises = store(clock, max_bytes=3 * size)
    kept = []
    for at in range(5):
        clock.now = float(at)
        promise = promises.new("one", "s")
        promises.settle(promise, JsonResult({}))
        if at in (1, 2):
            polled(promises, promise)
        kept.append(promise)
    found = [promises._by_id.get(promise.id) is not None for promise in kept]
    assert found == [True, False, False, True, True] and promises.nbytes == 3 * size


def test_another_tenants_promise_is_answered_as_one_that_does_not_exist() -> None:
    promises = store(Clock())
    promise = promises.new("one", "s")
    refusals = []
    for request_id, tenant in ((promise.id, "two"), (promise.id[:-1] + ("0" if promise.id[-1] != "0" else "1"), "two")):
        with pytest.raises(Refusal) as refused:
            promises.get(request_id, tenant)
        refusals.append((refused.value.status, refused.value.detail))
    assert refusals[0] == refusals[1]


def test_ids_of_an_ended_server_are_told_so_and_other_text_is_refused() -> None:
    before, after = store(Clock()), store(Clock())
    with pytest.raises(Refusal, match="belongs to a server that has ended") as refused:
        after.get(before.new("one", "s").id, "one")
    assert refused.value.status == 410
    for text in ("", "-", "x", "1" * 41, "../../etc/passwd", "é" * 41, "0" * 8 + "-" + "g" * 32):
        with pytest.raises(Refusal, match="request_id: found") as refused:
            after.get(text, "one")
        assert refused.value.status == 400


def test_ids_cannot_be_guessed() -> None:
    promises = store(Clock())
    ids = {promises.new("one", "s").id for _ in range(1000)}
    assert len(ids) == 1000 and all(len(each.split("-")[1]) * 4 >= 128 for each in ids)


def test_two_thousand_polls_wait_at_once_and_all_get_the_result() -> None:
    async def main() -> None:
        promises = store(Clock())
        promise, result = promises.new("one", "s"), JsonResult({})
        waiting = [asyncio.create_task(promises.wait(promise, 30.0)) for _ in range(2000)]
        await asyncio.sleep(0)
        promises.settle(promise, result)
        promises.settle(promise, JsonResult({"second": 1}))
        assert all(found is result for found in await asyncio.gather(*waiting))

    asyncio.run(main())
