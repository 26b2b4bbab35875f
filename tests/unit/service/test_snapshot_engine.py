"""The engine of a service, as far as it needs no engine."""

from __future__ import annotations

from rlsys.service.snapshot_engine import seeded
from rlsys.types import SamplingParams


def test_requests_without_a_seed_draw_anew_in_every_session() -> None:
    seeds = [seeded(SamplingParams()).seed for _ in range(60)]
    assert len(set(seeds)) == len(seeds) and all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


def test_a_seed_that_was_given_is_kept() -> None:
    params = SamplingParams(max_tokens=3, temperature=0.5, seed=0)
    assert seeded(params) == params
