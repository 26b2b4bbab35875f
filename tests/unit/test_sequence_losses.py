"""gspo against a float64 formula, and thresholds that come as inputs of a datum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlsys.datums import collate
from rlsys.errors import DatumError, MissingInputError
from rlsys.losses import RATIO_MASK, SEQUENCE, metrics, resolve
from rlsys.types import Datum, ModelInput
from tests.unit.tiny_learner import Models, draw, gradients, make, with_run

LENGTHS = [7, 1, 12, 5]
WIDE = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}


def columns(seed: int, off_policy: float = 0.2) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Four sequences; the first two positions of each are a prompt."""
    random, T = np.random.default_rng(seed), sum(LENGTHS)
    p = -random.exponential(1.0, T)
    advantages = np.repeat(random.normal(size=len(LENGTHS)), LENGTHS)
    for start in np.cumsum([0, *LENGTHS[:-1]]):
        advantages[start : start + 2] = 0.0
    found = {"weights": random.choice([0.0, 1.0, 2.0], T), "logprobs": p + random.normal(0, off_policy, T)}
    return p, {**found, "advantages": advantages, SEQUENCE: np.repeat(np.arange(len(LENGTHS)), LENGTHS)}


def value(p: np.ndarray, held: np.ndarray, found: dict[str, np.ndarray], low: float, high: float) -> float:
    """The loss with the ratio's stop-gradient at `held`."""
    total = 0.0
    for sequence in range(len(LENGTHS)):
        at = found[SEQUENCE] == sequence
        A, w = found["advantages"][at], found["weights"][at]
        counts = found[RATIO_MASK][at] != 0 if RATIO_MASK in found else (A != 0) & (w != 0)
        if not counts.any():
            continue
        s = np.exp((held[at] - found["logprobs"][at])[counts].mean()) * np.exp(p[at] - held[at])
        total -= (w * np.minimum(s * A, np.clip(s, low, high) * A))[A != 0].sum()
    return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("config", "low", "high"), [({}, 1 - 3e-4, 1 + 4e-4), (WIDE, 0.9, 1.1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gspo_is_the_papers_formula_and_its_gradient_is_the_slope(seed, config, low, high, masked):
    p, found = columns(seed)
    if masked:
        found[RATIO_MASK] = np.random.default_rng(9).choice([0.0, 1.0], len(p))
    logp = torch.tensor(p, requires_grad=True)
    loss = resolve("gspo", config)(logp, {key: torch.tensor(each) for key, each in found.items()}).sum()
    assert float(loss.detach()) == pytest.approx(value(p, p, found, low, high), rel=1e-12, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, logp)
    step = 1e-7
    for t in range(len(p)):
        moved = p + step * (np.arange(len(p)) == t)
        back = p - step * (np.arange(len(p)) == t)
        slope = (value(moved, p, found, low, high) - value(back, p, found, low, high)) / (2 * step)
        assert float(gradient[t]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_on_policy_gspo_is_importance_sampling():
    p, found = columns(3, off_policy=0.0)
    tensors = {key: torch.tensor(each) for key, each in found.items()}
    for name in ("gspo", "importance_sampling"):
        logp = torch.tensor(p, requires_grad=True)
        values = resolve(name)(logp, tensors)
        (gradient,) = torch.autograd.grad(values.sum(), logp)
        wanted = -found["weights"] * found["advantages"]
        np.testing.assert_allclose(values.detach().numpy(), wanted, atol=1e-12)
        np.testing.assert_allclose(gradient.numpy(), wanted, atol=1e-12)


def test_clip_fraction_of_gspo_is_that_of_whole_sequences():
    p, found = columns(4, off_policy=0.8)
    loss = resolve("gspo", WIDE)
    counts, s, A = found["weights"] != 0, np.ones(len(p)), found["advantages"]
    for sequence in range(len(LENGTHS)):
        at = found[SEQUENCE] == sequence
        inside = at & counts & (A != 0)
        if inside.any():
            s[at] = np.exp((p - found["logprobs"])[inside].mean())
    wanted = (((s > 1.1) & (A > 0)) | ((s < 0.9) & (A < 0)))[counts].mean()
    assert metrics(loss, p, found)["clip_fraction:mean"] == pytest.approx(wanted)
    assert 0 < wanted < 1


@pytest.mark.parametrize("budget", [24, 64, 1000])
def test_a_learners_gspo_does_not_depend_on_packing(budget: int, tiny_model: Models):
    batch, loss = draw(), resolve("gspo", WIDE)
    one = with_run(make(tiny_model(True), budget=10_000))
    wanted = one.forward_backward("run", batch, loss)
    learner = with_run(make(tiny_model(True), budget=budget))
    found = learner.forward_backward("run", batch, loss)
    assert found.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-5)
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradients(learner)[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_thresholds_per_token_are_those_of_the_config(name):
    p, found = columns(5)
    tensors = {key: torch.tensor(each) for key, each in found.items()}
    T = len(p)
    given = {"clip_low_threshold": torch.full((T,), 0.9), "clip_high_threshold": torch.full((T,), 1.1)}
    wanted = resolve(name, WIDE)(torch.tensor(p), tensors)
    np.testing.assert_allclose(resolve(name)(torch.tensor(p), {**tensors, **given}).numpy(), wanted.numpy(), rtol=1e-6)
    half = {"clip_low_threshold": given["clip_low_threshold"]}
    wanted = resolve(name, {"clip_low_threshold": 0.9})(torch.tensor(p), tensors)
    np.testing.assert_allclose(resolve(name)(torch.tensor(p), {**tensors, **half}).numpy(), wanted.numpy(), rtol=1e-6)


def datum(**more: object) -> Datum:
    inputs = {"target_tokens": [2, 3], "logprobs": [0.0, -1.0], "advantages": [0.0, 1.0]}
    return Datum(ModelInput.from_ints([1, 2]), {**inputs, **more})


def test_optional_inputs_are_in_all_datums_or_in_none_and_in_range():
    loss = resolve("gspo")
    batch = collate([datum(sequence_ratio_mask=[0, 1])] * 2, loss, vocab_size=10, max_length=8)
    assert batch.columns[RATIO_MASK].tolist() == [0, 1, 0, 1]
    with pytest.raises(MissingInputError, match=r"datum 1: .*'sequence_ratio_mask'.* is missing; other datums have it"):
        collate([datum(sequence_ratio_mask=[0, 1]), datum()], loss, vocab_size=10, max_length=8)
    with pytest.raises(DatumError, match=r"'clip_low_threshold'.*found values from 0.5 to 1.5; wanted 0 <= low <= 1"):
        collate([datum(clip_low_threshold=[0.5, 1.5])], loss, vocab_size=10, max_length=8)
    with pytest.raises(DatumError, match=r"'clip_low_threshold'.* is not an input of 'dro'"):
        collate([datum(clip_low_threshold=[0.5, 0.5])], resolve("dro"), vocab_size=10, max_length=8)
