"""Users take turns at the engines, whatever they ask for at once."""

from __future__ import annotations

import asyncio

import pytest

from rlsys.serve.sample_turns import SampleTurns


async def held(turns: SampleTurns, user: str, n: int, began: list[str], end: asyncio.Event) -> None:
    async with turns.turn(user, n):
        began.append(user)
        await end.wait()


def test_a_small_request_beside_a_thousand_of_another_user_is_next() -> None:
    async def main() -> None:
        turns, began = SampleTurns(4), list[str]()
        ends = [asyncio.Event() for _ in range(1000)]
        tasks = [asyncio.create_task(held(turns, "big", 1, began, end)) for end in ends]
        await asyncio.sleep(0)
        small = asyncio.create_task(held(turns, "small", 1, began, asyncio.Event()))
        await asyncio.sleep(0)
        assert began == ["big"] * 4 and (turns.running, turns.waiting) == (4, 997)
        ends[0].set()
        await asyncio.sleep(0.01)
        assert began == ["big"] * 4 + ["small"]
        for task in (small, *tasks):
            task.cancel()
        await asyncio.gather(small, *tasks, return_exceptions=True)
        assert (turns.running, turns.waiting) == (0, 0)

    asyncio.run(main())


def test_users_who_ask_for_as_much_get_as_much() -> None:
    async def main() -> None:
        turns, began = SampleTurns(6), list[str]()
        end = asyncio.Event()
        tasks = [asyncio.create_task(held(turns, user, 2, began, end)) for user in "aaaaabbbbbccccc"]
        await asyncio.sleep(0)
        end.set()
        await asyncio.gather(*tasks)
        assert began[:3] == ["a", "a", "a"]  # nobody else had asked
        assert [began[3:].count(user) for user in "abc"] == [2, 5, 5]
        assert began[3:5] == ["b", "c"]

    asyncio.run(main())


def test_a_request_above_the_capacity_runs_alone_and_nobody_waits_for_ever() -> None:
    async def main() -> None:
        turns, began = SampleTurns(4), list[str]()
        first, second = asyncio.Event(), asyncio.Event()
        big = asyncio.create_task(held(turns, "a", 100, began, first))
        small = asyncio.create_task(held(turns, "b", 1, began, second))
        await asyncio.sleep(0)
        assert began == ["a"]
        first.set()
        second.set()
        await asyncio.gather(big, small)
        assert began == ["a", "b"]

    asyncio.run(main())


@pytest.mark.parametrize("waits", [True, False])
def test_a_cancelled_request_frees_its_place_once(waits: bool) -> None:
    async def main() -> None:
        turns, began = SampleTurns(1), list[str]()
        end = asyncio.Event()
        tasks = [asyncio.create_task(held(turns, user, 1, began, end)) for user in "abc"]
        await asyncio.sleep(0)
        tasks[1 if waits else 0].cancel()
        await asyncio.sleep(0.01)
        assert began == (["a"] if waits else ["a", "b"])
        end.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert began == (["a", "c"] if waits else ["a", "b", "c"]) and turns.running == 0

    asyncio.run(main())
