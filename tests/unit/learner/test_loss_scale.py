"""A model that computes in float16 has the gradients of one that computes in float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys import losses
from rlsys.config import LoraSection
from rlsys.datums import DatumBatch
from rlsys.errors import GradientError
from rlsys.learner import loss_scale
from rlsys.learner.learner import Learner
from rlsys.types import AdamParams
from tests.unit.tiny_learner import Models, datums_of, draw, gradients, make, with_run

LORA = LoraSection(rank=4, alpha=8.0)


def learner_in(path: Models, dtype: torch.dtype, budget: int = 64) -> Learner:
    learner = with_run(make(path(True), dtype, budget=budget), LORA)
    for name, weight in learner.runs["run"].parameters.items():
        if name.endswith(".lora_B"):
            weight.data *= 1e-3  # as after the first steps
    return learner


def small(scale: float) -> DatumBatch:
    """Advantages as of a loss that is divided by the tokens of a batch."""
    batch = draw()
    return DatumBatch(
        batch.tokens,
        batch.targets,
        batch.offsets,
        {
            **batch.columns,
            "advantages": (scale * batch.columns["advantages"]).astype(np.float32),
            "logprobs": np.full(len(batch.tokens), -4.2, np.float32),
        },
    )


def away(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative distance of a tensor."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def update(learner: Learner, batch: DatumBatch, custom: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    if custom:
        advantages = torch.from_numpy(batch.columns["advantages"]).split(batch.lengths.tolist())
        result = learner.forward_backward_custom(
            "run",
            batch,
            datums_of(batch),
            lambda data, logprobs: (
                -torch.stack([(a * p).sum() for a, p in zip(advantages, logprobs, strict=True)]).sum(),
                {},
            ),
        )
    else:
        result = learner.forward_backward("run", batch, losses.resolve("importance_sampling"))
    found = gradients(learner)
    learner.runs.forget_gradient("run")
    return found, dict(result.metrics)


@pytest.mark.parametrize("custom", [False, True], ids=["", "custom"])
def test_small_gradients_vanish_without_a_scale_and_do_not_with_it(
    tiny_model: Models, custom: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = small(1e-4)
    wanted, _ = update(learner_in(tiny_model, torch.float32), batch, custom)
    learner = learner_in(tiny_model, torch.float16)
    found, metrics = update(learner, batch, custom)
    assert away(found, wanted) < 0.02 and metrics["overflows:sum"] == 0
    monkeypatch.setattr(loss_scale, "first_scale", lambda slope: 1.0)
    bare, _ = update(learner, batch, custom)
    assert away(bare, wanted) > 0.2


@pytest.mark.parametrize("custom", [False, True], ids=["", "custom"])
def test_a_gradient_that_overflows_is_made_again_and_counted(
    tiny_model: Models, custom: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = small(1.0)
    wanted, _ = update(learner_in(tiny_model, torch.float32), batch, custom)
    learner = learner_in(tiny_model, torch.float16)
    monkeypatch.setattr(loss_scale, "LARGEST", 2.0**22)
    found, metrics = update(learner, batch, custom)
    again, of_again = update(learner, batch, custom)
    assert away(found, wanted) < 0.02 and metrics["overflows:sum"] > 0
    assert of_again == metrics and all(torch.equal(found[name], again[name]) for name in found)  # no memory of it


def test_gradients_add_up_over_micro_batches_and_calls(tiny_model: Models) -> None:
    batch, loss = small(1e-4), losses.resolve("importance_sampling")
    one, many = learner_in(tiny_model, torch.float16, 1000), learner_in(tiny_model, torch.float16, 20)
    wanted, _ = update(one, batch, False)
    many.forward_backward("run", batch, loss)
    many.forward_backward("run", batch, loss)
    assert away({name: value / 2 for name, value in gradients(many).items()}, wanted) < 0.02
    assert math.isfinite(many.optim_step("run", AdamParams())["grad_norm"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_infinite_at_every_scale_stays_so_and_no_step_is_taken(tiny_model: Models, bad: float) -> None:
    learner, batch = learner_in(tiny_model, torch.float16), small(1.0)
    batch.columns["advantages"][batch.offsets[1] - 1] = bad
    learner.forward_backward("run", batch, losses.resolve("importance_sampling"))
    with pytest.raises(GradientError):
        learner.optim_step("run", AdamParams())


def test_a_scale_is_a_power_of_two_that_brings_slopes_to_their_place() -> None:
    for largest in (1e-9, 0.3, 1.0, 7e5):
        scale = loss_scale.first_scale(torch.tensor([0.1 * largest, -largest]))
        assert math.frexp(scale)[0] == 0.5 and loss_scale.LARGEST / 2 < scale * largest <= loss_scale.LARGEST
    assert loss_scale.first_scale(torch.zeros(3)) == loss_scale.first_scale(torch.tensor([math.nan])) == 1.0
