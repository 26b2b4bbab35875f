"""What one actor makes for another does not pass through the process that orders the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray._private import worker as ray_worker

from actors.cluster.column_refs import by_reference
from rlsys.rollouts import Rollouts

BATCHES, TOKENS = 40, 4000  # of 12 bytes: below the 100 KB that Ray would send to the caller


class Maker:
    """Answers as a sampler does."""

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]
    def sample(self) -> tuple[Rollouts, dict[str, float]]:
        rollouts = Rollouts(
            problems=np.zeros(1, np.int64),
            prompt_tokens=np.zeros(1, np.int32),
            prompt_offsets=np.array([0, 1]),
            group=np.zeros(1, np.int32),
            tokens=np.arange(TOKENS, dtype=np.int32),
            logprobs=np.zeros(TOKENS, np.float32),
            versions=np.zeros(TOKENS, np.int32),
            offsets=np.array([0, TOKENS]),
            stop_reasons=np.zeros(1, np.int8),
        )
        return rollouts, rollouts.counts()

    def total(self, *rollouts: Rollouts) -> int:
        return sum(int(one.tokens.sum(dtype=np.int64)) for one in rollouts)

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)


@pytest.fixture(scope="module")
def connected(ray_cluster: str) -> Iterator[None]:
    ray.init(address=ray_cluster, log_to_driver=False)
    yield
    ray.shutdown()


def held_here() -> int:
    """Bytes in Ray's store of small objects within this process."""
    return int(ray_worker.global_worker.core_worker.get_local_memory_store_bytes_used())


def made(options: dict[str, Any]) -> tuple[int, int]:
    """(bytes that came here with the batches of an actor, what another call makes of them)."""
    actor = ray.remote(Maker).options(num_cpus=0, **options).remote()
    before = held_here()
    batches, counts = zip(*(actor.sample.remote() for _ in range(BATCHES)), strict=True)
    assert sum(one["tokens"] for one in ray.get(list(counts))) == BATCHES * TOKENS
    came = held_here() - before
    total: int = ray.get(actor.total.remote(*batches))
    ray.kill(actor)
    return came, total


def test_columns_stay_with_their_maker_and_counts_come(connected: None) -> None:
    payload = 12 * TOKENS * BATCHES
    plain, plain_total = made({})
    kept, kept_total = made(by_reference({}))
    assert plain > payload, "Ray no longer sends small results to the caller: by_reference is not needed any more"
    assert kept < payload / 100
    assert kept_total == plain_total == BATCHES * TOKENS * (TOKENS - 1) // 2


def test_the_environment_that_a_place_asks_for_is_kept(connected: None) -> None:
    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "3"}}}
    actor = ray.remote(Maker).options(**by_reference(options)).remote()
    assert ray.get(actor.variable.remote("OMP_NUM_THREADS")) == "3"
    assert options == {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "3"}}}
    ray.kill(actor)
