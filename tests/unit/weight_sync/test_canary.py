"""A canary's bound follows the model's own noise, sees late positions, and refuses what the noise does not explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.data.problems import ProblemSet
from rlsys.datums import DatumBatch
from rlsys.errors import WeightSyncError
from rlsys.learner.learner import Learner
from rlsys.learner.policy import gap_by_position
from rlsys.weight_sync.attest import attest_base
from rlsys.weight_sync.canary import LONG_TOKENS, SHORT_TOKENS, Canary, bound, by_depth, canary_tokens, compared
from tests.families.tiny_models import FAMILIES

TOKENS = np.random.default_rng(0).integers(3, 300, LONG_TOKENS).astype(np.int32)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama2"].save(tmp_path_factory.mktemp("llama"))


def learner_of(folder: Path, dtype: Any) -> Learner:
    learner = Learner(folder, ModelSection(path=str(folder), dtype=dtype, max_length=2048), LearnerSection())
    learner.runs.create("run", LoraSection(rank=4), seed=0)
    return learner


def test_the_long_canary_reaches_position_1500_where_the_model_does() -> None:
    positions = compared(LONG_TOKENS)
    assert positions[-1] >= 1500
    assert [first for first, *_ in by_depth(positions)] == [48, 240, 496, 1008, 1520]
    ((first, last, places),) = by_depth(compared(70))
    assert (first, last, places.tolist()) == (48, 70, list(range(22)))
    assert compared(2).tolist() == [1]


def test_short_prompts_are_repeated_until_the_canary_is_long() -> None:
    made = canary_tokens(ProblemSet(("a b c",), ("d",), np.array([5, 6, 7], np.int32), np.array([0, 3])))
    assert len(made) == LONG_TOKENS
    assert made[:6].tolist() == [5, 6, 7, 5, 6, 7]


def test_the_bound_is_a_multiple_of_the_noise_and_never_below_the_least() -> None:
    assert bound(0.0, "float32", "float32") == 1e-3
    assert bound(0.045, "bfloat16", "bfloat16") == pytest.approx(0.18)
    assert bound(1e-5, "bfloat16", "bfloat16") == 1e-2
    assert bound(1e-5, "bfloat16", "float32") == 1e-1


def test_a_model_with_more_noise_gets_a_wider_bound_and_a_smaller_probe(deep_model: Path) -> None:
    exact, rough = (Canary(learner_of(deep_model, dtype), dtype, TOKENS) for dtype in ("float32", "bfloat16"))
    of_exact, of_rough = exact.startup("run"), rough.startup("run")
    assert of_exact.base.bounds == (1e-3,) * 5
    assert min(of_rough.base.bounds) > 1e-3
    for startup in (of_exact, of_rough):
        update = startup.update
        separation = np.abs(update.canary_new - update.canary_previous).mean()
        assert update.bound <= 0.25 * separation
        assert len(update.canary_tokens) == SHORT_TOKENS


def test_rotary_frequencies_in_bfloat16_are_seen_at_late_positions_and_not_at_early_ones(deep_model: Path) -> None:
    """The fault that a canary of 64 tokens cannot see."""
    startup = Canary(learner_of(deep_model, "bfloat16"), "bfloat16", TOKENS).startup("run")
    broken = learner_of(deep_model, "bfloat16")
    for name, buffer in broken._model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.data = buffer.data.to(torch.bfloat16).to(buffer.dtype)
    scored = broken.logprobs(None, TOKENS, np.array([0, LONG_TOKENS]))[startup.base.positions]
    gap = np.abs(scored - startup.base.logprobs)
    of_depth = [gap[part].mean() for *_, part in by_depth(startup.base.positions)]
    assert of_depth[0] <= startup.base.bounds[0]
    assert of_depth[-1] > startup.base.bounds[-1]
    with pytest.raises(WeightSyncError, match=r"positions 1520-1535: .*grows with the position.*rotary"):
        attest_base("0", startup.base, scored, 0.0, None)
    attest_base("0", startup.base, startup.base.logprobs, 0.0, None)
    attest_base("0", startup.base, scored, 0.0, 10.0)  # a bound that the user gave


def test_a_base_of_other_weights_and_one_without_numbers_are_refused(deep_model: Path) -> None:
    base = Canary(learner_of(deep_model, "float32"), "float32", TOKENS).startup("run").base
    for scored in (base.logprobs + 0.1, np.full_like(base.logprobs, np.nan)):
        with pytest.raises(WeightSyncError, match="the base model's log-probabilities differ from the learner's"):
            attest_base("0", base, scored, 0.0, None)
    attest_base("0", replace(base, bounds=(0.2,) * 5), base.logprobs + 0.1, 0.0, None)


def test_gaps_are_reported_by_position_in_the_sequence(tiny_model: Callable[[bool], Path]) -> None:
    lengths = [100, 300]
    offsets = np.array([0, 100, 400])
    q = np.zeros(400, np.float32)
    p = np.concatenate([np.arange(1, length + 1) for length in lengths]).astype(np.float32)  # the token's position
    weights = np.ones(400, np.float32)
    weights[:10] = 0.0
    batch = DatumBatch(np.zeros(400, np.int32), np.zeros(400, np.int32), offsets, {"weights": weights, "logprobs": q})
    found = gap_by_position(batch, p)
    assert found["policy/logprob_diff_0_64_max"] == 63.0
    assert found["policy/logprob_diff_0_64_mean"] == pytest.approx(np.r_[11:64, 1:64].mean())
    assert found["policy/logprob_diff_64_256_max"] == 255.0
    assert found["policy/logprob_diff_256_512_mean"] == pytest.approx(np.arange(256, 301).mean())
    assert "policy/logprob_diff_512_1024_mean" not in found
