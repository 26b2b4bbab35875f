"""The order of calls is that of their numbers, whatever the order of arrival; no call runs twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from rlsys.client.backend import RunProgress
from rlsys.errors import GradientError, StalledError
from rlsys.service.call_order import RESULTS_KEPT, CallOrder


def recording(done: list[int], number: int, seconds: float = 0.0) -> Callable[[], Awaitable[int]]:
    async def work() -> int:
        await asyncio.sleep(seconds)
        done.append(number)
        return number

    return work


@pytest.mark.parametrize("seed", range(20))
def test_calls_run_in_the_order_of_their_numbers_and_one_at_a_time(seed: int) -> None:
    done: list[int] = []

    async def main() -> None:
        order, draw, inside = CallOrder(5.0), random.Random(seed), 0

        async def call(number: int) -> None:
            async def work() -> None:
                nonlocal inside
                inside += 1
                assert inside == 1
                await asyncio.sleep(draw.random() / 1000)
                done.append(number)
                inside -= 1

            await asyncio.sleep(draw.random() / 100)
            await order.run(number, "call", work)

        numbers = list(range(1, 21))
        draw.shuffle(numbers)
        await asyncio.gather(*map(call, numbers))

    asyncio.run(main())
    assert done == list(range(1, 21))


def test_a_call_that_fails_lets_the_next_one_in() -> None:
    async def main() -> int:
        order = CallOrder(5.0)

        async def fails() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await order.run(1, "call", fails)
        return await order.run(2, "call", recording([], 2))

    assert asyncio.run(main()) == 2


def test_a_number_that_is_used_again_gets_the_first_result_and_does_not_run_again() -> None:
    async def main() -> tuple[list[int], list[int]]:
        order, done = CallOrder(5.0), list[int]()
        at_once = await asyncio.gather(*(order.run(1, "call", recording(done, 1, 0.01)) for _ in range(3)))
        later = [await order.run(1, "call", recording(done, 1)), await order.run(2, "call", recording(done, 2))]
        return done, [*at_once, *later]

    assert asyncio.run(main()) == ([1, 2], [1, 1, 1, 1, 2])


def test_a_failed_call_that_is_used_again_fails_with_the_first_error() -> None:
    async def main() -> int:
        order, runs = CallOrder(5.0), 0

        async def fails() -> None:
            nonlocal runs
            runs += 1
            raise GradientError("no gradient")

        for _ in range(2):
            with pytest.raises(GradientError, match="no gradient"):
                await order.run(1, "optim_step", fails)
        return runs

    assert asyncio.run(main()) == 1


def test_a_done_number_whose_result_is_not_kept_is_refused_and_does_not_run() -> None:
    async def main() -> list[int]:
        order, done = CallOrder(5.0), list[int]()
        for number in range(1, RESULTS_KEPT + 3):
            await order.run(number, "call", recording(done, number))
        with pytest.raises(StalledError, match="call 1 of this client is done, and its result is not kept"):
            await order.run(1, "call", recording(done, 1))
        return done

    assert asyncio.run(main()) == list(range(1, RESULTS_KEPT + 3))


def test_the_order_tells_what_ran_what_is_pending_and_the_next_unused_number() -> None:
    async def main() -> list[RunProgress]:
        order, seen = CallOrder(5.0), list[RunProgress]()
        seen.append(RunProgress(order.next, order.pending))
        await order.run(1, "call", recording([], 1))
        calls = [asyncio.create_task(order.run(number, "call", recording([], number, 0.05))) for number in (2, 4)]
        await asyncio.sleep(0.01)
        seen.append(RunProgress(order.next, order.pending))
        await calls[0]
        seen.append(RunProgress(order.next, order.pending))
        await order.run(3, "call", recording([], 3))
        await calls[1]
        return [*seen, RunProgress(order.next, order.pending)]

    seen = asyncio.run(main())
    assert seen == [RunProgress(1), RunProgress(2, (2, 4)), RunProgress(3, (4,)), RunProgress(5)]
    assert [progress.unused for progress in seen] == [1, 5, 5, 5]


def test_a_gap_closes_once_for_all_calls_behind_it() -> None:
    async def main() -> list[int]:
        order, done = CallOrder(0.1), list[int]()
        began = asyncio.get_running_loop().time()
        calls = [asyncio.create_task(order.run(number, "optim_step", recording(done, number))) for number in (3, 4, 5)]
        with pytest.raises(StalledError, match=r"optim_step: call 3 .* waits for call 1.* Calls 1 to 2 will not run"):
            await calls[0]
        assert await calls[1] == 4 and await calls[2] == 5
        assert asyncio.get_running_loop().time() - began < 0.2, "the calls behind it waited again"
        with pytest.raises(StalledError, match="Calls 1 to 2 will not run"):
            await order.run(2, "call", recording(done, 2))
        assert await order.run(6, "call", recording(done, 6)) == 6
        return done

    assert asyncio.run(main()) == [4, 5, 6]


def test_a_call_waits_longer_than_the_limit_for_one_that_is_running() -> None:
    async def main() -> list[int]:
        order, done = CallOrder(0.05), list[int]()
        slow = order.run(1, "call", recording(done, 1, 0.3))
        await asyncio.gather(slow, order.run(2, "call", recording(done, 2)))
        return done

    assert asyncio.run(main()) == [1, 2]
