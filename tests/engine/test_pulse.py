"""An engine shows that it moves, stops at once what nobody wants any more, and says what it died of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlsys.config import ModelSection
from rlsys.errors import ActorDiedError, SamplingError
from rlsys.rollouts import offsets_of
from rlsys.sampler.engine import Sampler
from rlsys.types import SamplingParams
from tests.engine.tiny_engine import BOUND, MAX_LENGTH, SECTION, Reference, at_work

Run = Callable[..., Any]
LONG = SamplingParams(max_tokens=100, seed=3, stop=[])
PROMPT: dict[str, Any] = {
    "problems": np.array([7]),
    "prompt_tokens": np.arange(9, dtype=np.int32) + 2,
    "prompt_offsets": offsets_of([9]),
}


def test_progress_changes_in_the_middle_of_one_long_request_and_only_then(sampler: Sampler, run: Run) -> None:
    async def look() -> tuple[int, int]:
        task = asyncio.create_task(sampler.sample(**PROMPT, n=1, params=LONG, run_id=None, version=-1))
        seen = {await sampler.progress()}
        while not task.done():
            seen.add(await sampler.progress())
            await asyncio.sleep(0.001)
        assert len((await task).tokens) == 100
        after = await sampler.progress()
        await asyncio.sleep(0.3)
        assert await sampler.progress() == after, "an idle engine does not seem to move"
        return len(seen), after[0] - min(seen)[0]

    different, moved = run(look())
    assert different > 4 and moved >= 100


def test_a_rewound_run_lets_go_of_its_requests_and_takes_the_same_version_again(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    old, new = reference.adapter(4, 1), reference.adapter(4, 2)
    ask = {**PROMPT, "n": 4, "params": LONG}

    async def rewind() -> Any:
        await sampler.load(reference.update("a", 1, old), BOUND)
        await sampler.load(reference.update("a", 2, old), BOUND)
        await sampler.load(reference.update("b", 1, old), BOUND)
        mine = [asyncio.create_task(sampler.sample(**ask, run_id="a", version=version)) for version in (1, 2)]
        other = asyncio.create_task(sampler.sample(**ask, run_id="b", version=1))
        await at_work(sampler, calls=3)
        await sampler.roll_back("a")
        for task in mine:
            with pytest.raises(SamplingError, match=r"adapter a/\d#\d+ was taken out while it worked"):
                await task
        assert len((await other).tokens) == 400, "another run goes on"
        still = await sampler.progress()
        await asyncio.sleep(0.3)
        assert await sampler.progress() == still, "the engine works for nobody"
        assert sampler.stats().live == (("b", 1),) and sampler.stats().running_requests == 0
        await sampler.load(reference.update("a", 1, new), BOUND)
        await sampler.roll_back("nobody")
        return await sampler.sample(**ask, run_id="a", version=1)

    rollouts = run(rewind())
    whole = np.concatenate([rollouts.prompt(0), rollouts.completion(0)])
    assert np.abs(reference.logprobs(whole, new)[8:] - rollouts.logprobs[:100]).max() < BOUND


def test_a_caller_that_is_cancelled_is_not_told_of_a_rewind(sampler: Sampler, reference: Reference, run: Run) -> None:
    async def cancel() -> None:
        await sampler.load(reference.update("a", 1, reference.adapter(4, 1)), BOUND)
        task = asyncio.create_task(sampler.sample(**PROMPT, n=1, params=LONG, run_id="a", version=1))
        await at_work(sampler)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sampler.stats().running_requests == 0

    run(cancel())


def test_a_dead_engine_is_a_death_with_its_cause_for_whatever_is_asked(reference: Reference, run: Run) -> None:
    async def die() -> None:
        model = ModelSection(path=str(reference.folder), max_length=MAX_LENGTH)
        sampler = Sampler(name="9", base=reference.folder, model=model, section=SECTION, seed=5)
        await sampler.start()
        (process,) = sampler.engine.llm.engine_core.resources.engine_manager.processes
        await sampler.load(reference.update("a", 1, reference.adapter(4, 1)), BOUND)
        long = replace(LONG, max_tokens=100)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(sampler.sample(**PROMPT, n=8, params=long, run_id="a", version=1))
        ]
        await at_work(sampler)
        process.kill()
        tasks += [
            asyncio.create_task(sampler.sample(**PROMPT, n=1, params=long, run_id=None, version=-1)),
            asyncio.create_task(sampler.load(reference.update("a", 2, reference.adapter(4, 2)), BOUND)),
            # as a request that vLLM takes in while it fails those that it knows: it was seen to wait for ever
            asyncio.create_task(sampler.engine.guarded(asyncio.Event().wait())),
        ]
        for task in tasks:
            with pytest.raises(ActorDiedError, match=r"^sampler 9.*the vLLM engine failed: "):
                await task
        before = await sampler.progress()
        assert before == await sampler.progress()
        await sampler.stop()

    run(die())
