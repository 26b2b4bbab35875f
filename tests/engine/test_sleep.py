"""Sleeping beside a learner. On CPU there is no device memory to give back; on a GPU this was not run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlsys.config import ModelSection
from rlsys.errors import SamplingError
from rlsys.rollouts import offsets_of
from rlsys.sampler.engine import Sampler
from rlsys.types import SamplingParams
from tests.engine.tiny_engine import BOUND, MAX_LENGTH, SECTION, Reference, at_work

Run = Callable[..., Any]
TOKENS = np.arange(30, dtype=np.int32) + 2


def test_on_cpu_a_sampler_serves_the_same_after_sleep_and_wake(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    run(sampler.load(reference.update("a", 1, reference.adapter(4, 1)), BOUND))
    before = run(sampler.logprobs(TOKENS, offsets_of([30]), "a", 1))
    run(sampler.sleep())
    run(sampler.sleep())
    run(sampler.wake())
    np.testing.assert_array_equal(run(sampler.logprobs(TOKENS, offsets_of([30]), "a", 1)), before)


def test_a_sampler_at_work_refuses_to_sleep(sampler: Sampler, run: Run) -> None:
    async def sleep_at_work() -> None:
        params = SamplingParams(max_tokens=90, seed=1, stop=[])
        work = asyncio.create_task(sampler.sample(np.array([1]), TOKENS, offsets_of([30]), 2, params, None, -1))
        await at_work(sampler)
        with pytest.raises(SamplingError, match="found 1 running requests; wanted none before it sleeps"):
            await sampler.sleep()
        assert len((await work).tokens) == 180

    run(sleep_at_work())


def test_only_a_colocated_sampler_on_cuda_can_sleep_and_workers_are_never_ray_s(reference: Reference) -> None:
    def arguments(device: Any, **section: Any) -> dict[str, Any]:
        model = ModelSection(path=str(reference.folder), max_length=MAX_LENGTH)
        sampler = Sampler(
            name="s",
            base=reference.folder,
            model=model,
            section=SECTION.model_copy(update=section),
            seed=0,
            device=device,
        )
        return sampler.engine.arguments()

    assert "enable_sleep_mode" not in arguments("cpu", colocate=True)
    assert arguments("cuda", colocate=True)["enable_sleep_mode"] is True
    assert arguments("cuda")["worker_cls"] == "rlsys.sampler.vllm.cuda_worker.CudaWorker"
    assert arguments("cuda")["enable_sleep_mode"] is False
    assert arguments("cpu")["distributed_executor_backend"] == "uni"
    assert "distributed_executor_backend" not in arguments("cuda")
    four = arguments("cuda", tensor_parallel_size=4)
    assert (four["tensor_parallel_size"], four["distributed_executor_backend"]) == (4, "mp")
