"""On a tiny model of each family: vLLM's CPU engine gives what the learner gives, with the base and with an adapter.

Each family has an engine process of its own, which ends before the next begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import SamplerSection
from rlsys.learner.export import export_adapter
from rlsys.sampler.engine import Sampler, prepare_environment
from rlsys.types import Array
from rlsys.weight_sync.update import WeightUpdate
from tests.families.adapted import LENGTH, MODELS, OFFSETS, TOKENS, Adapted, distance

SECTION = SamplerSection(
    kv_cache_gb=0.1, max_num_seqs=16, max_num_batched_tokens=1024, max_lora_rank=8, max_live_adapters=2
)
FUSED = ("phi3", "glm4")  # of which a tensor-parallel worker takes rows that do not lie together
Run = Callable[[Coroutine[Any, Any, Any]], Any]

prepare_environment(SECTION)


@dataclass(frozen=True, slots=True)
class Served:
    trained: Adapted
    sampler: Sampler

    def update(self) -> WeightUpdate:
        """Version 0 of the run, with a canary that a wrong adapter does not pass."""
        new, base = (self.trained.logprobs(run_id)[:63] for run_id in ("run", None))
        snapshot = self.trained.learner.snapshot("run", "float32")
        return WeightUpdate(snapshot, TOKENS[:64], new, base, self.trained.bound)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, run: Run, trained_of: Callable[[str], Adapted]) -> Iterator[Served]:
    yield from serving(trained_of(request.param), SECTION, run)


@pytest.fixture(scope="module", params=FUSED)
def pair(request: pytest.FixtureRequest, run: Run, trained_of: Callable[[str], Adapted]) -> Iterator[Served]:
    yield from serving(trained_of(request.param), SECTION.model_copy(update={"tensor_parallel_size": 2}), run)


def serving(trained: Adapted, section: SamplerSection, run: Run) -> Iterator[Served]:
    sampler = Sampler(name=trained.family.name, base=trained.folder, model=trained.model, section=section, seed=1)
    run(sampler.start())
    yield Served(trained, sampler)
    run(sampler.stop())


def test_the_engine_scores_as_the_learner_does_without_and_with_an_adapter(served: Served, run: Run) -> None:
    check_scores(served, run)


def test_two_workers_hold_and_serve_a_fused_adapter(pair: Served, run: Run) -> None:
    check_scores(pair, run)


def check_scores(served: Served, run: Run) -> None:
    update = served.update()
    assert run(served.sampler.load(update)).digest == update.snapshot.digest
    for which in ((None, -1), ("run", 0)):
        found = run(served.sampler.logprobs(TOKENS, OFFSETS, *which))[1:]
        assert distance(found, served.trained.logprobs(which[0])) < served.trained.bound, which


def test_vllm_s_own_loader_takes_the_exported_adapter(served: Served, run: Run, tmp_path: Path) -> None:
    export_adapter(served.trained.checkpoints / "inner", tmp_path / "adapter", for_vllm=True)
    found = run(scored_by_vllm(served.sampler, tmp_path / "adapter"))
    assert distance(found, served.trained.logprobs("inner")) < served.trained.bound


async def scored_by_vllm(sampler: Sampler, adapter: Path) -> Array:
    """(LENGTH - 1,) under an adapter that vLLM loads from its folder, as its server does."""
    from vllm.lora.request import LoRARequest

    from rlsys.sampler.requests import score_params

    request = LoRARequest(lora_name="plain", lora_int_id=1000, lora_path=str(adapter))
    prompt = {"type": "token", "prompt_token_ids": TOKENS.tolist()}
    asked = sampler.engine.llm.generate(prompt, score_params(), "plain", lora_request=request)
    (output,) = [output async for output in asked]
    scores = np.asarray(output.prompt_logprobs.logprobs, np.float32)
    assert len(scores) == LENGTH - 1
    return scores
