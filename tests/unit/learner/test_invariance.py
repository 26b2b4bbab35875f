"""A loss is a sum over tokens, so its gradient may depend on nothing else: not on how a batch is cut, packed, ordered,
padded or spread over calls. ||g - g'|| <= bound ||g|| for every parameter; what is zero is zero either way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys import losses
from rlsys.config import LearnerSection, LoraSection
from rlsys.datums import DatumBatch, take
from rlsys.distributed.ranks import ALONE
from rlsys.learner.learner import Learner
from rlsys.learner.runs import BASE_RUN
from rlsys.learner.token_budget import TokenBudget
from rlsys.modeling import prefix_layout
from rlsys.types import Array
from tests.unit.tiny_learner import (
    ALL_TARGETS,
    BOUNDS,
    LOSSES,
    Models,
    alone,
    assert_close,
    datums_of,
    draw,
    gradients,
    lend,
    make,
    plain,
    preference,
    weights,
    with_run,
)

CUSTOM = "custom"
EVERY_LOSS = [*LOSSES, CUSTOM]
DATUMS = 4
PAIRS = np.arange(DATUMS).reshape(-1, 2)


def slope_of_preference(batch: DatumBatch, p_T: Array) -> Array:
    """(T,) its derivative on paper: -+ 0.1 sigmoid(-0.1 margin) w + 0.02 w p."""
    w_T = batch.columns["weights"].astype(np.float64)
    margins = np.add.reduceat(w_T * p_T, batch.offsets[:-1]) @ np.kron(np.eye(batch.num_datums // 2), [[1], [-1]])
    sign_D = np.tile([-1.0, 1.0], batch.num_datums // 2)
    slope_D = sign_D * np.repeat(0.1 / (1 + np.exp(0.1 * margins)), 2)
    return w_T * (np.repeat(slope_D, batch.lengths) + 0.02 * p_T)


def slope_of(loss: str, batch: DatumBatch, p_T: Array) -> Array:
    """(T,) dL/dp on paper, in float64; thresholds 0.8 and 1.2, beta 0.05."""
    if loss == CUSTOM:
        return slope_of_preference(batch, p_T)
    w_T, q_T, adv_T = (batch.columns[key].astype(np.float64) for key in ("weights", "logprobs", "advantages"))
    r_T = np.exp(p_T - q_T)
    clipped = np.where(adv_T > 0, r_T > 1.2, r_T < 0.8)
    return (
        w_T
        * {
            "cross_entropy": -np.ones_like(p_T),
            "importance_sampling": -r_T * adv_T,
            "ppo": np.where(clipped, 0.0, -r_T * adv_T),
            "cispo": -np.clip(r_T, 0.8, 1.2) * adv_T,
            "dro": -(adv_T - 0.05 * (p_T - q_T)),
        }[loss]
    )


def submit(learner: Learner, run: str, batch: DatumBatch, loss: str) -> None:
    if loss == CUSTOM:
        learner.forward_backward_custom(run, batch, datums_of(batch), preference)
    else:
        learner.forward_backward(run, batch, losses.resolve(loss))


@cache
def learner_of(path: Path, dtype: torch.dtype, trainable: Literal["lora", "all"] = "lora") -> Learner:
    """Its weights stay as they are: no test of this module takes a step."""
    learner = make(path, dtype, trainable=trainable)
    return with_run(learner) if trainable == "lora" else learner


def gradient_by(learner: Learner, run: str, loss: str) -> Callable[..., dict[str, Tensor]]:
    learner.runs[run].take_gradients()  # of a test that failed

    def gradient(budget: int, batches: list[DatumBatch], chunk: int = 1000) -> dict[str, Tensor]:
        learner._forward.section = LearnerSection(token_budget=budget, logprob_chunk_tokens=chunk)
        learner._forward.budget = TokenBudget(budget, ALONE)
        for part in batches:
            submit(learner, run, part, loss)
        found = gradients(learner, run)
        learner.runs[run].take_gradients()
        return found

    return gradient


def padded(batch: DatumBatch, by: int) -> DatumBatch:
    """Every datum with `by` further tokens that do not count."""
    at = np.repeat(batch.offsets[1:], by)
    junk = np.random.default_rng(9).integers(0, 64, len(at)).astype(np.int32)
    return DatumBatch(
        np.insert(batch.tokens, at, junk),
        np.insert(batch.targets, at, junk[::-1]),
        batch.offsets + by * np.arange(len(batch.offsets)),
        {key: np.insert(column, at, 0.0 if key == "weights" else -1.0) for key, column in batch.columns.items()},
    )


@pytest.mark.parametrize("loss", EVERY_LOSS)
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_gradients_do_not_depend_on_how_a_batch_is_submitted(
    tiny_model: Models,
    loss: str,
    dtype: torch.dtype,
    bound: float,
    trainable: Literal["lora", "all"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, run = draw(DATUMS), "run" if trainable == "lora" else BASE_RUN
    gradient = gradient_by(learner_of(tiny_model(True), dtype, trainable), run, loss)
    whole = gradient(1000, [batch])
    random = np.random.default_rng(3)
    order = random.permutation(PAIRS).reshape(-1) if loss == CUSTOM else random.permutation(DATUMS)
    assert_close(gradient(1, [batch]), whole, bound)  # each sequence by itself
    assert_close(gradient(25, [batch], chunk=4), whole, bound)  # packed, in chunks
    assert_close(gradient(40, [take(batch, order)]), whole, bound)  # permuted
    assert_close(gradient(1000, [take(batch, range(2)), take(batch, range(2, DATUMS))]), whole, bound)  # 4 = 2 + 2
    assert_close(gradient(30, [take(batch, pair) for pair in PAIRS]), whole, bound)
    assert_close(gradient(1000, [padded(batch, 7)]), whole, bound)  # tokens of weight 0
    monkeypatch.setattr(prefix_layout, "SHORTEST_SHARE", 0.0)  # all rows in one rectangle, mostly padding
    assert_close(gradient(1000, [batch]), whole, bound)


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_a_tensor_without_gradient_has_none_however_the_batch_is_cut(tiny_model: Models, loss: str) -> None:
    """B of a new adapter is 0, so A's gradient is exactly 0: no rounding of a split may fill it."""
    learner = lend(tiny_model(True))
    learner.runs.create("run", ALL_TARGETS, 1)
    gradient = gradient_by(learner, "run", loss)
    for found in (gradient(1000, [draw()]), gradient(25, [draw()], chunk=4)):
        assert all((value.norm() == 0) == name.endswith("lora_A") for name, value in found.items())


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_adapter_gradients_are_the_closed_form(tiny_model: Models, loss: str) -> None:
    """With G = dL/dW of the merged weights W + s B A: dL/dA = s B^T G and dL/dB = s G A^T, and dL/dp is on paper."""
    path, batch = tiny_model(False), draw()
    lora = LoraSection(rank=4, alpha=8.0, train_unembed=True)
    learner, scale = with_run(lend(path, torch.float64, budget=30), lora), 2.0
    submit(learner, "run", batch, loss)
    own, model = weights(learner), merged(path, weights(learner), scale)
    p_T = alone(model, batch)
    slope_T = torch.from_numpy(slope_of(loss, batch, p_T.detach().numpy()))
    (p_T * slope_T).sum().backward()
    modules, wanted = dict(model.named_modules()), {}
    for name in {name.rpartition(".")[0] for name in own}:
        G = modules[name].weight.grad
        wanted[f"{name}.lora_A"] = scale * own[f"{name}.lora_B"].T @ G
        wanted[f"{name}.lora_B"] = scale * G @ own[f"{name}.lora_A"].T
    assert_close(gradients(learner), wanted, 1e-10)


def merged(path: Path, adapter: dict[str, Tensor], scale: float) -> torch.nn.Module:
    model: torch.nn.Module = plain(path)
    modules = dict(model.named_modules())
    for name in {name.rpartition(".")[0] for name in adapter}:
        modules[name].weight.data += scale * adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]
    return model
