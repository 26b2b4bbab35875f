"""Which snapshots are in an engine: a bound, the longest idle first, none under a request."""

from __future__ import annotations

import asyncio
import random

import pytest

from rlsys.errors import StalledError
from rlsys.service.snapshot_cache import SnapshotCache


class Engine:
    """What an engine would refuse: too many snapshots, the same twice, or one taken out under a request."""

    def __init__(self, bound: int, limit_s: float = 5.0) -> None:
        self.bound, self.loads = bound, 0
        self.held: set[str] = set()
        self.used: dict[str, int] = {}
        self.snapshot_cache = SnapshotCache(bound, self.load, self.unload, limit_s)

    async def load(self, key: str) -> None:
        await asyncio.sleep(0)
        assert key not in self.held and len(self.held) < self.bound
        self.held.add(key)
        self.loads += 1

    async def unload(self, key: str) -> None:
        assert not self.used.get(key)
        self.held.remove(key)
        await asyncio.sleep(0)

    async def request(self, key: str, seconds: float = 0.0) -> None:
        async with self.snapshot_cache.using(key):
            self.used[key] = self.used.get(key, 0) + 1
            assert key in self.held
            await asyncio.sleep(seconds)
            assert key in self.held
            self.used[key] -= 1


@pytest.mark.parametrize("seed", range(10))
def test_any_mix_of_requests_is_served_within_the_bound(seed: int) -> None:
    async def main() -> None:
        engine, draw = Engine(3), random.Random(seed)

        async def one() -> None:
            await asyncio.sleep(draw.random() / 50)
            await engine.request(f"s{draw.randrange(6)}", draw.random() / 100)

        await asyncio.gather(*(one() for _ in range(80)))
        assert len(engine.held) <= 3 and set(engine.snapshot_cache.keys) == engine.held

    asyncio.run(main())


def test_the_one_idle_for_longest_leaves_and_comes_back() -> None:
    async def main() -> None:
        engine = Engine(2)
        for key in ("a", "b", "a", "c"):
            await engine.request(key)
        assert engine.held == {"a", "c"}
        await engine.request("b")
        assert engine.held == {"b", "c"} and engine.loads == 4

    asyncio.run(main())


def test_a_full_engine_makes_a_request_wait_and_then_refuses_it() -> None:
    async def main() -> None:
        engine = Engine(1, limit_s=0.05)
        busy = asyncio.create_task(engine.request("a", 1.0))
        await asyncio.sleep(0.01)
        with pytest.raises(StalledError, match="holds 1 snapshots, all of them in use"):
            await engine.request("b")
        await busy
        await engine.request("b")

    asyncio.run(main())


def test_a_snapshot_in_use_stays_until_its_requests_are_done() -> None:
    async def main() -> None:
        engine = Engine(2)
        busy = asyncio.create_task(engine.request("a", 0.05))
        await asyncio.sleep(0.01)
        await engine.snapshot_cache.unload_when_idle("a")
        assert busy.done() and not engine.held
        await engine.snapshot_cache.unload_when_idle("a")  # nothing to do

    asyncio.run(main())


def test_a_load_that_fails_leaves_no_trace() -> None:
    async def main() -> None:
        async def fail(key: str) -> None:
            raise ZeroDivisionError

        async def unload(key: str) -> None: ...

        residency = SnapshotCache(1, fail, unload, 1.0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                async with residency.using("a"):
                    pass
        assert residency.keys == []

    asyncio.run(main())
