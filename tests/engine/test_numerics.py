"""Sampler against learner: the same tokens, the same weights, two programs. Figures go to docs/numerics.md (-rP)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.architectures.precision import computing_dtype
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.learner.learner import Learner
from rlsys.learner.policy import join_prompts
from rlsys.rollouts import offsets_of
from rlsys.sampler.engine import Sampler
from rlsys.sampler.vllm.adapter_worker import _narrowed
from rlsys.types import SamplingParams
from rlsys.weight_sync.update import WeightUpdate
from tests.engine.tiny_engine import MAX_LENGTH, SECTION, VOCAB, Reference

CANARY = (np.arange(64) * 7 % VOCAB).astype(np.int32)


# Of means, in nats.
BOUNDS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_learner_and_sampler_give_sampled_tokens_the_same_log_probability(
    reference: Reference, run: Callable[..., Any], engine: Sampler, dtype: Any
) -> None:
    """Nearly all CPUs lack kernels for float16, and many for bfloat16. Both programs then compute in float32 with
    weights of that dtype, and only the sampler's adapter is rounded to it."""
    computing = computing_dtype(dtype, "cpu")
    bound = BOUNDS[dtype] if computing == dtype else 2e-3
    model = ModelSection(path=str(reference.folder), max_length=MAX_LENGTH, dtype=dtype)
    learner = Learner(reference.folder, model, LearnerSection())

    def canary(run_id: str | None) -> np.ndarray[Any, Any]:
        return learner.logprobs(run_id, CANARY, np.array([0, len(CANARY)]))[1:]

    learner.runs.create("run", LoraSection(rank=8, train_unembed=True), seed=1)
    learner.runs.enlarge("run", size=0.2, seed=3)
    update = WeightUpdate(learner.snapshot("run", dtype), CANARY, canary("run"), canary(None), bound)
    assert np.abs(update.canary_new - update.canary_previous).mean() > 0.1
    random = np.random.default_rng(0)
    lengths = random.integers(3, 40, 32)
    prompts = random.integers(2, VOCAB, lengths.sum()).astype(np.int32)
    params = SamplingParams(max_tokens=64, seed=1, stop=[])
    own = dtype != "float32"  # which the engine of the session has
    sampler = Sampler(name="sampler-0", base=reference.folder, model=model, section=SECTION, seed=5) if own else engine
    if own:
        run(sampler.start())
    try:
        run(sampler.load(update, bound))
        for run_id, version in ((None, -1), ("run", 0)):
            rollouts = run(sampler.sample(np.arange(32), prompts, offsets_of(lengths), 8, params, run_id, version))
            tokens, offsets, sampled = join_prompts(rollouts)
            gap = np.abs(learner.logprobs(run_id, tokens, offsets)[sampled] - rollouts.logprobs)
            print(f"{dtype}, {run_id or 'base'}: {len(gap)} tokens, mean {gap.mean():.2e}, max {gap.max():.2e}")
            assert gap.mean() <= (bound if run_id else BOUNDS[computing])
        run(sampler.unload("run", 0))
    finally:
        if own:
            run(sampler.stop())


def test_a_slot_wider_than_the_adapter_that_came_must_hold_its_values() -> None:
    came = torch.tensor([[1.0, -0.5], [3.0, 2.0**-7]])
    assert torch.equal(_narrowed("a", came, torch.bfloat16), came.bfloat16())
    with pytest.raises(ValueError, match=r"slot of a holds values that are not of torch\.bfloat16"):
        _narrowed("a", came * (1 + 2.0**-12), torch.bfloat16)
