"""Futures: one answer for threads and tasks."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from rlsys.client.futures import ApiFuture, Ready
from rlsys.errors import DatumError, StalledError


def test_threads_and_tasks_get_one_and_the_same_value() -> None:
    inner: Future[int] = Future()
    read: list[int] = []

    def decode(found: int) -> list[int]:
        read.append(found)
        return [found]

    future = ApiFuture(inner, "a call", decode)

    async def ask() -> Any:
        return await asyncio.gather(future, future.result_async(), future.result_async(timeout=600))

    threading.Timer(0.05, inner.set_result, [7]).start()
    answers = asyncio.run(ask())
    assert all(answer is answers[0] for answer in answers) and future.result() is answers[0] == [7]
    assert read == [7]


def test_an_error_is_raised_as_it_was_every_time() -> None:
    inner: Future[int] = Future()
    inner.set_exception(DatumError("datum 3: found nothing"))
    future = ApiFuture(inner, "a call", lambda found: found)
    for _ in range(2):
        with pytest.raises(DatumError, match="datum 3"):
            future.result()
        with pytest.raises(DatumError, match="datum 3"):
            asyncio.run(future.result_async())


def test_a_late_answer_is_named_and_can_be_asked_for_again() -> None:
    inner: Future[int] = Future()
    future = ApiFuture(inner, "training client m: forward", lambda found: found)
    with pytest.raises(StalledError, match=r"training client m: forward: no answer within 0.01 s"):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        asyncio.run(future.result_async(timeout=0.01))
    inner.set_result(1)
    assert future.result() == 1


def test_a_task_that_stops_waiting_does_not_stop_the_call() -> None:
    inner: Future[int] = Future()
    future = ApiFuture(inner, "a call", lambda found: found)

    async def give_up() -> None:
        task = asyncio.create_task(future.result_async())
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(give_up())
    assert not inner.cancelled()
    inner.set_result(2)
    assert future.result() == 2


def test_a_client_is_its_own_future() -> None:
    client = Ready()

    async def ask() -> Ready:
        return await client

    assert client.result() is client and asyncio.run(ask()) is client and asyncio.run(client.result_async()) is client
