"""Turns: the order of numbers, whatever the order of arrival."""

from __future__ import annotations

import asyncio
import random

import pytest

from rlsys.errors import StalledError
from rlsys.service.call_order import CallOrder


@pytest.mark.parametrize("seed", range(20))
def test_calls_run_in_the_order_of_their_numbers_and_one_at_a_time(seed: int) -> None:
    done: list[int] = []

    async def main() -> None:
        turns, draw, inside = CallOrder(5.0), random.Random(seed), 0

        async def call(number: int) -> None:
            nonlocal inside
            await asyncio.sleep(draw.random() / 100)
            async with turns.turn(number, "call"):
                inside += 1
                assert inside == 1
                await asyncio.sleep(draw.random() / 1000)
                done.append(number)
                inside -= 1

        numbers = list(range(1, 21))
        draw.shuffle(numbers)
        await asyncio.gather(*map(call, numbers))

    asyncio.run(main())
    assert done == list(range(1, 21))


def test_a_call_that_fails_lets_the_next_one_in() -> None:
    async def main() -> None:
        turns = CallOrder(5.0)
        with pytest.raises(ZeroDivisionError):
            async with turns.turn(1, "call"):
                raise ZeroDivisionError
        async with turns.turn(2, "call"):
            pass

    asyncio.run(main())


def test_a_call_does_not_wait_for_ever_for_one_that_never_comes() -> None:
    async def main() -> None:
        turns = CallOrder(0.05)
        with pytest.raises(StalledError, match=r"optim_step: call 2 .* waits for call 1"):
            async with turns.turn(2, "optim_step"):
                pass

    asyncio.run(main())


def test_a_call_waits_longer_than_the_limit_for_one_that_is_running() -> None:
    async def main() -> list[int]:
        turns, done = CallOrder(0.05), []

        async def slow() -> None:
            async with turns.turn(1, "call"):
                await asyncio.sleep(0.3)
                done.append(1)

        async def second() -> None:
            async with turns.turn(2, "call"):
                done.append(2)

        await asyncio.gather(slow(), second())
        return done

    assert asyncio.run(main()) == [1, 2]
