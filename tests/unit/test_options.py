"""Each option of the algorithm, through its YAML, against a case worked out by hand; and the recipes of the docs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rlsys.advantages import to_minibatches
from rlsys.config import JobConfig, keys, parse_config
from rlsys.datums import DatumBatch
from rlsys.learner.policy import cap_importance
from rlsys.losses import resolve
from rlsys.rollouts import LENGTH, Rollouts, offsets_of
from rlsys.types import Array

DOCS = Path(__file__).parents[2] / "docs" / "algorithms.md"
RECIPES = re.findall(r"^### (.+?)$.*?^```yaml\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def job(options: str, *overrides: str) -> JobConfig:
    return parse_config(f"run: {{name: options}}\nmodel: {{make: {{}}}}\n{options}", overrides)


def of_completions(
    config: JobConfig, lengths: list[int], rewards: list[float], gaps: list[float] | None = None
) -> Array:
    """(T,) advantages of one group's completions; ``gaps``: q - log p_ref of each token."""
    T = sum(lengths)
    rollouts = Rollouts(
        problems=np.zeros(1, np.int64),
        prompt_tokens=np.zeros(1, np.int32),
        prompt_offsets=np.array([0, 1]),
        group=np.zeros(len(lengths), np.int32),
        tokens=np.zeros(T, np.int32),
        logprobs=np.full(T, -1.0, np.float32),
        versions=np.zeros(T, np.int32),
        offsets=offsets_of(lengths),
        stop_reasons=np.array([LENGTH if n == max(lengths) else 0 for n in lengths], np.int8),
    )
    reference = None if gaps is None else rollouts.logprobs - np.array(gaps)
    (batch,), _, _, _ = to_minibatches(rollouts, np.array(rewards), config.rl, 1, reference)
    return batch.columns["advantages"][batch.columns["weights"] > 0].astype(np.float64)


# One group: completions of 1, 2, 3 and 2 tokens, the first is right.
# mean 1/4, so centred 3/4, -1/4, -1/4, -1/4; std sqrt((9/16 + 3/16) / 3) = 1/2; the mean of the others 0 or 1/3
LENGTHS, REWARDS = [1, 2, 3, 2], [1.0, 0.0, 0.0, 0.0]
ADVANTAGES = {
    # Dr. GRPO
    "{}": [3 / 4, -1 / 4, -1 / 4, -1 / 4],
    "{baseline: none}": [1, 0, 0, 0],
    "{baseline: leave_one_out}": [1, -1 / 3, -1 / 3, -1 / 3],
    "{normalise: std}": [3 / 2, -1 / 2, -1 / 2, -1 / 2],
    "{baseline: leave_one_out, normalise: std}": [2, -2 / 3, -2 / 3, -2 / 3],
    # GRPO: each over its own tokens
    "{normalise: std, aggregate: length}": [3 / 2, -1 / 4, -1 / 6, -1 / 4],
    "{aggregate: length}": [3 / 4, -1 / 8, -1 / 12, -1 / 8],
    "{aggregate: max_tokens}": [3 / 40, -1 / 40, -1 / 40, -1 / 40],
    "{baseline: none, aggregate: max_tokens}": [1 / 10, 0, 0, 0],
}


@pytest.mark.parametrize(("options", "wanted"), ADVANTAGES.items())
def test_advantages_by_hand(options: str, wanted: list[float]) -> None:
    config = job(f"rl: {{sampling: {{max_tokens: 10}}, advantages: {options}}}")
    found = of_completions(config, LENGTHS, REWARDS)
    np.testing.assert_allclose(found, np.repeat(wanted, LENGTHS), rtol=3e-6)  # 1e-6 is added to the std of 1/2


# Completions of 2 and 1 tokens, rewards 1 and 0: A = 1/2, 1/2 and -1/2. d = 1, 2 and 6, mean 3; times 0.1: the terms
# are 0.2, 0.1 and -0.3
KL = {
    "{kl_coef: 0.1}": [0.7, 0.6, -0.8],
    "{kl_coef: 0.1, kl_discount: 0.5}": [0.75, 0.6, -0.8],  # the first token also has half of the second's 0.1
    "{kl_coef: 0.1, aggregate: length}": [0.35, 0.3, -0.8],  # the divisor takes the KL term too
    "{kl_coef: 0.1, baseline: none}": [1.2, 1.1, -0.3],
}


@pytest.mark.parametrize(("options", "wanted"), KL.items())
def test_kl_in_the_reward_by_hand(options: str, wanted: list[float]) -> None:
    config = job(f"rl: {{advantages: {options}}}")
    np.testing.assert_allclose(of_completions(config, [2, 1], [1.0, 0.0], [1.0, 2.0, 6.0]), wanted, atol=1e-6)


def test_overlong_completions_are_masked_by_hand() -> None:
    # the one of 3 tokens ran into the limit: it stays in the mean of 1/4 and its tokens go
    config = job("rl: {overlong: {handling: mask}}")
    assert of_completions(config, LENGTHS, REWARDS).tolist() == [3 / 4, *[-1 / 4] * 4]


LOSSES = [
    # loss, A, r, value by hand
    ("{name: importance_sampling}", 0.5, 1.5, -0.75),
    ("{name: ppo}", 1.0, 1.25, -1.2),  # 1.2 is as far as it goes
    ("{name: ppo, params: {clip_low_threshold: 0.8, clip_high_threshold: 1.28}}", 1.0, 1.25, -1.25),  # clip-higher
    ("{name: ppo, params: {clip_low_threshold: 0.8, clip_high_threshold: 1.28}}", 1.0, 1.5, -1.28),
    ("{name: ppo, params: {clip_low_threshold: 0.8, clip_high_threshold: 1.28}}", -1.0, 0.5, 0.8),  # low as before
    ("{name: ppo, params: {clip_low_threshold: 0.8, clip_high_threshold: 1.28}}", -1.0, 1.5, 1.5),
    # q = log 1/2 throughout: p = log 0.75 and log 0.05
    ("{name: cispo, params: {clip_low_threshold: 0, clip_high_threshold: 1.28}}", 1.0, 1.5, -1.28 * math.log(0.75)),
    ("{name: cispo, params: {clip_low_threshold: 0, clip_high_threshold: 1.28}}", 1.0, 0.1, -0.1 * math.log(0.05)),
]


@pytest.mark.parametrize(("options", "advantage", "ratio", "wanted"), LOSSES)
def test_clipping_on_both_sides_by_hand(options: str, advantage: float, ratio: float, wanted: float) -> None:
    section = job(f"rl: {{loss: {options}}}").rl.loss
    q = torch.tensor([math.log(0.5)], dtype=torch.float64)
    columns = {"logprobs": q, "advantages": torch.tensor([advantage], dtype=torch.float64)}
    value = resolve(section.name, section.params)(q + math.log(ratio), columns)
    assert value.item() == pytest.approx(wanted)


CAPPED = [
    # p = 0.6, p_old = 0.5, q = 0.2: p_old / q = 2.5, p / p_old = 1.2; A = 0.5
    ("{name: importance_sampling, importance_cap: 2}", -2 * 1.2 * 0.5),
    (
        "{name: importance_sampling, importance_cap: 3}",
        -2.5 * 1.2 * 0.5,
    ),  # p / q = 3 whole: below the cap nothing changes
    ("{name: ppo, params: {clip_high_threshold: 1.1}, importance_cap: 2}", -2 * 1.1 * 0.5),
    ("{name: cispo, params: {clip_high_threshold: 1.1}, importance_cap: 2}", -2 * 1.1 * 0.5 * math.log(0.6)),
]


@pytest.mark.parametrize(("options", "wanted"), CAPPED)
def test_truncated_importance_sampling_by_hand(options: str, wanted: float) -> None:
    section = job(f"rl: {{loss: {options}}}").rl.loss
    one = np.zeros(1, np.int32)
    columns = {"weights": np.ones(1), "logprobs": np.log([0.2]), "advantages": np.array([0.5])}
    assert section.importance_cap is not None
    batch, _ = cap_importance(DatumBatch(one, one, np.array([0, 1]), columns), np.log([0.5]), section.importance_cap)
    tensors = {key: torch.from_numpy(column).double() for key, column in batch.columns.items()}
    value = resolve(section.name, section.params)(torch.tensor([math.log(0.6)]).double(), tensors)
    assert value.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("name", "options"), RECIPES, ids=[name for name, _ in RECIPES])
def test_every_recipe_of_the_docs_is_a_job(name: str, options: str) -> None:
    config = job(options)
    resolve(config.rl.loss.name, config.rl.loss.params)
    assert config != job(""), "a recipe that sets nothing"


def test_the_docs_have_the_recipes_that_people_look_for() -> None:
    names = " / ".join(name for name, _ in RECIPES)
    for wanted in ("GRPO", "Dr. GRPO", "RLOO", "REINFORCE", "PPO", "DAPO", "CISPO", "Kimi k1.5", "KL"):
        assert wanted in names


def test_the_docs_name_every_option_of_the_algorithm() -> None:
    text = DOCS.read_text(encoding="utf-8")
    sections = ("rl.loss.", "rl.advantages.", "rl.overlong.", "rl.optim.schedule", "rl.substeps", "rl.refill_rounds")
    terms = {"rewards.correct", "rewards.format", "rewards.format_pattern", "rewards.length"}
    wanted = {key for key in keys() if key.startswith(sections) or key in terms}
    assert sorted(key for key in wanted if f"`{key}`" not in text) == []
