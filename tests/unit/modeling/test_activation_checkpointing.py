"""Gradient checkpointing saves memory and changes no bit; entropy is a figure beside the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from rlsys import losses
from rlsys.config import LearnerSection, ModelSection
from rlsys.learner.learner import Learner
from rlsys.learner.runs import BASE_RUN
from rlsys.modeling.logprobs import BLOCK, CHUNK_BYTES
from rlsys.planning.memory import LOGIT_BLOCK, LOGIT_BYTES
from tests.unit.tiny_learner import Models, assert_same_bits, draw, gradients, plain, with_run


def learner_of(path: Path, trainable: Literal["lora", "all"] = "lora", **keys: object) -> Learner:
    section = LearnerSection(token_budget=60, **keys)
    learner = Learner(path, ModelSection(path=str(path)), section, trainable=trainable)
    return learner if trainable == "all" else with_run(learner)


def kept_bytes(learner: Learner, run: str) -> int:
    """What autograd holds at the end of the forward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in learner._model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.forward_backward(run, draw(), losses.resolve("ppo"))
    learner.runs.forget_gradient(run)
    return sum(kept.values())


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_layers_that_run_again_give_the_same_bits_and_keep_less(
    tiny_model: Models, trainable: Literal["lora", "all"]
) -> None:
    run = BASE_RUN if trainable == "all" else "run"
    found = {}
    for checkpointed in (False, True):
        learner = learner_of(tiny_model(True), trainable, gradient_checkpointing=checkpointed)
        result = learner.forward_backward(run, draw(), losses.resolve("importance_sampling"))
        slopes = gradients(learner, run)
        learner.runs.forget_gradient(run)
        found[checkpointed] = (result, slopes, kept_bytes(learner, run))
    assert found[True][0].loss_sum == found[False][0].loss_sum
    assert np.array_equal(found[True][0].logprobs, found[False][0].logprobs)
    assert_same_bits(found[True][1], found[False][1])
    assert found[True][2] < 0.5 * found[False][2]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_whole_distribution_at_the_tokens_that_count(
    tiny_model: Models, temperature: float
) -> None:
    path, batch = tiny_model(True), draw()
    learner = Learner(
        path, ModelSection(path=str(path)), LearnerSection(token_budget=30, entropy=True), dtype=torch.float64
    )
    result = learner.forward(None, batch, losses.resolve("ppo"), temperature, where="weighted")
    model, wanted = plain(path), []
    for d in range(batch.num_datums):
        part = slice(batch.offsets[d], batch.offsets[d + 1])
        logits = model(torch.from_numpy(batch.tokens[part].astype(np.int64))[None]).logits[0] / temperature
        of_datum = torch.distributions.Categorical(logits=logits).entropy().detach().numpy()
        wanted.append(of_datum[batch.columns["weights"][part] != 0])
    assert result.metrics["entropy:mean"] == pytest.approx(np.concatenate(wanted).mean(), rel=1e-9)


def test_without_being_asked_for_there_is_no_entropy(tiny_model: Models) -> None:
    result = learner_of(tiny_model(True)).forward("run", draw(), losses.resolve("ppo"))
    assert "entropy:mean" not in result.metrics


def test_the_memory_plan_knows_the_chunks_that_log_probabilities_are_made_in() -> None:
    assert (LOGIT_BYTES, LOGIT_BLOCK) == (CHUNK_BYTES, BLOCK)
