"""Completions of a group share one forward and backward of their prompt, and nothing else of a result changes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from rlsys import losses
from rlsys.config import LearnerSection
from rlsys.datums import DatumBatch
from rlsys.distributed.ranks import ALONE
from rlsys.learner.learner import Learner
from rlsys.learner.runs import BASE_RUN
from rlsys.learner.token_budget import TokenBudget
from rlsys.rollouts import spans
from rlsys.types import BatchResult
from tests.examples import examples
from tests.unit.tiny_learner import LOSSES, Models, datums_of, gradients, make, preference, with_run

CUSTOM = "custom"
Where = Literal["all", "weighted"]


@cache
def learner_of(path: Path, dtype: torch.dtype) -> Learner:
    return with_run(make(path, dtype))


@st.composite
def groups(draw: st.DrawFn) -> DatumBatch:
    """Groups of 1 to 6 completions of 1 to 15 tokens on prompts of 2 to 40, in an even number for pairs; prompts are
    masked, and so are some tokens in the midst of completions, as a tool's reply is."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prompts, completions = [], []
    for _ in range(draw(st.integers(1, 4))):
        prompt = random.integers(0, 64, draw(st.integers(2, 40)))
        for _ in range(draw(st.integers(1, 6))):
            prompts.append(prompt)
            completions.append(random.integers(0, 3, draw(st.integers(1, 15))))  # few tokens: they may begin alike
    if len(prompts) % 2:
        prompts.append(prompts[-1])
        completions.append(completions[-1])  # the very same sequence twice
    rows = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    lengths = np.array([len(row) - 1 for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights = (random.random(offsets[-1]) < 0.9).astype(np.float32)
    weights[spans(offsets[:-1], np.array([len(prompt) - 1 for prompt in prompts]))] = 0.0
    return DatumBatch(
        np.concatenate([row[:-1] for row in rows]).astype(np.int32),
        np.concatenate([row[1:] for row in rows]).astype(np.int32),
        offsets,
        {
            "weights": weights,
            "logprobs": random.uniform(-6, -1, offsets[-1]).astype(np.float32),
            "advantages": random.normal(size=offsets[-1]).astype(np.float32),
        },
    )


def update(
    learner: Learner, batch: DatumBatch, loss: str, where: Where, *, share: bool, budget: int = 1000, chunk: int = 1000
) -> tuple[BatchResult, dict[str, Tensor]]:
    run = BASE_RUN if BASE_RUN in learner.runs.ids else "run"
    learner._forward.section = LearnerSection(share_prompts=share, token_budget=budget, logprob_chunk_tokens=chunk)
    learner._forward.budget = TokenBudget(budget, ALONE)
    if loss == CUSTOM:
        result = learner.forward_backward_custom(run, batch, datums_of(batch), preference)
    else:
        result = learner.forward_backward(run, batch, losses.resolve(loss), where=where)
    found = gradients(learner, run)
    learner.runs.forget_gradient(run)
    return result, found


def norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    """||g - g'|| <= bound ||g|| of the whole gradient, and of each tensor that is more than a tenth of it. Smaller ones
    may be what is left of terms as large as the whole, as a key's where there are two: rounding of those terms (1e-7 of
    the whole) is no small part of them. Their bound is one of the whole: 1e-6 in float32."""
    assert found.keys() == wanted.keys()
    whole = norm(wanted.values())
    assert norm(found[name] - wanted[name] for name in wanted) <= bound * whole > 0
    for name, gradient in wanted.items():
        assert norm([found[name] - gradient]) <= bound * max(norm([gradient]), whole / 10), name


@examples(3, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(groups(), st.integers(20, 120), st.integers(3, 40))
@pytest.mark.parametrize("loss", [*LOSSES, CUSTOM])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_shared_prompt_gives_the_gradients_of_one_that_is_not(
    tiny_model: Models, loss: str, dtype: torch.dtype, bound: float, batch: DatumBatch, budget: int, chunk: int
) -> None:
    learner = learner_of(tiny_model(True), dtype)
    plain, wanted = update(learner, batch, loss, "all", share=False)
    cases: list[tuple[Where, int, int]] = [("all", 1000, 1000), ("weighted", 1000, 1000), ("weighted", budget, chunk)]
    if not any(gradient.norm() > 0 for gradient in wanted.values()):
        return  # every token is clipped
    for where, tokens, rows in cases:
        result, found = update(learner, batch, loss, where, share=True, budget=tokens, chunk=rows)
        assert_close(found, wanted, bound)
        counts = batch.columns["weights"] != 0 if where == "weighted" and loss != CUSTOM else slice(None)
        np.testing.assert_allclose(result.logprobs[counts], plain.logprobs[counts], rtol=2e-6, atol=2e-6)
        assert result.loss_sum == pytest.approx(plain.loss_sum, rel=10 * bound, abs=10 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_weights_get_the_same_gradients_too(tiny_model: Models, dtype: torch.dtype) -> None:
    learner = make(tiny_model(True), dtype, trainable="all")
    prompt = np.arange(30) % 64
    rows = [np.concatenate([prompt, np.full(3 + i, i)]) for i in range(4)]
    offsets = np.concatenate([[0], np.cumsum([len(row) - 1 for row in rows])])
    tokens, targets = (np.concatenate([row[cut] for row in rows]) for cut in (slice(-1), slice(1, None)))
    batch = DatumBatch(
        tokens.astype(np.int32), targets.astype(np.int32), offsets, {"weights": np.ones(offsets[-1], np.float32)}
    )
    _, wanted = update(learner, batch, "cross_entropy", "all", share=False)
    _, found = update(learner, batch, "cross_entropy", "all", share=True)
    assert_close(found, wanted, 1e-5 if dtype == torch.float32 else 1e-10)


def test_where_the_weight_is_zero_no_logprob_is_computed_and_the_metrics_are_the_same(tiny_model: Models) -> None:
    learner = learner_of(tiny_model(True), torch.float32)
    random = np.random.default_rng(0)
    offsets = np.array([0, 20, 45])
    batch = DatumBatch(
        random.integers(0, 64, 45).astype(np.int32),
        random.integers(0, 64, 45).astype(np.int32),
        offsets,
        {
            "weights": np.repeat([0, 1, 0, 1], [12, 8, 10, 15]).astype(np.float32),
            "logprobs": random.uniform(-6, -1, 45).astype(np.float32),
            "advantages": random.normal(size=45).astype(np.float32),
        },
    )
    every, _ = update(learner, batch, "ppo", "all", share=True)
    some, _ = update(learner, batch, "ppo", "weighted", share=True)
    assert (some.logprobs[batch.columns["weights"] == 0] == 0.0).all() and (every.logprobs < 0).all()
    assert some.metrics.keys() == every.metrics.keys()
    for name, value in every.metrics.items():
        assert some.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_logprobs_of_some_tokens_are_those_of_all_of_them(tiny_model: Models) -> None:
    learner = learner_of(tiny_model(True), torch.float64)
    random = np.random.default_rng(1)
    prompt = random.integers(0, 64, 30)
    rows = [np.concatenate([prompt, random.integers(0, 64, n)]) for n in (4, 1, 9)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    tokens = np.concatenate(rows)
    every = learner.logprobs("run", tokens, offsets)
    only = spans(offsets[:-1] + 30, np.array([4, 1, 9]))
    some = learner.logprobs("run", tokens, offsets, only=only)
    np.testing.assert_allclose(some[only], every[only], rtol=0, atol=1e-6)
    assert np.count_nonzero(some) == len(only) and np.count_nonzero(every) == len(tokens) - 3
