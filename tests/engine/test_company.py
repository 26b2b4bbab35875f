"""What a seeded request draws has the same bits whatever else the engine does, in float32 on CPU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlsys.rollouts import Rollouts, offsets_of
from rlsys.sampler.engine import Sampler
from rlsys.types import SamplingParams
from tests.engine.tiny_engine import BOUND, VOCAB, Reference

DRAWN = SamplingParams(max_tokens=24, seed=3, stop=[])
PROMPTS = np.random.default_rng(0).integers(2, VOCAB, (20, 40)).astype(np.int32)


@pytest.mark.parametrize(("run_id", "version"), [(None, -1), ("a", 1)])
def test_a_completion_has_the_same_bits_alone_and_in_company(
    sampler: Sampler, reference: Reference, run: Callable[..., Any], run_id: str | None, version: int
) -> None:
    run(sampler.load(reference.update("a", 1, reference.adapter(8, 1)), BOUND))

    def draw(problems: int, n: int, late: float = 0.0, who: tuple[str | None, int] = (run_id, version)) -> Any:
        async def sample() -> Rollouts:
            await asyncio.sleep(late)
            tokens, offsets = PROMPTS[:problems].ravel(), offsets_of([40] * problems)
            return await sampler.sample(np.arange(problems), tokens, offsets, n, DRAWN, *who)

        return sample()

    async def beside(*others: Any) -> Rollouts:
        whole: Rollouts = (await asyncio.gather(draw(1, 1, late=0.01), *others))[0]
        return whole

    alone = run(beside())
    crowd = [run(beside(draw(20, 3))), run(beside(draw(2, 2), draw(20, 1, who=(None, -1)))), run(draw(20, 8))]
    for other in crowd:
        np.testing.assert_array_equal(other.tokens[:24], alone.tokens)
        np.testing.assert_array_equal(other.logprobs[:24], alone.logprobs)
