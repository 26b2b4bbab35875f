"""A learning rate that explodes ends in one sentence that names the step and the cause, not in NaNs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_learner import assert_same_bits, state

from rlsys.config import JobConfig, parse_config
from rlsys.datums import DatumBatch
from rlsys.errors import CheckpointError, DivergedError, MismatchError
from rlsys.learner import Learner
from rlsys.policy import Policy, join_prompts
from rlsys.rollouts import Rollouts
from rlsys.types import Array

CANARY = np.arange(1, 17, dtype=np.int32)
LENGTH = 12


def job(base: Path, *overrides: str) -> JobConfig:
    config = "run: {name: unit}\nlora: {rank: 4}\nrl: {optim: {warmup_steps: 0}}"
    return parse_config(config, [f"model.path={base}", "model.max_length=64", *overrides])


def policy_of(base: Path, *overrides: str) -> Policy:
    config = job(base, *overrides)
    return Policy(Learner(base, config.model, config.learner), config, CANARY)


def on_policy(policy: Policy, advantages: Array) -> DatumBatch:
    """One datum whose log-probabilities are the policy's own."""
    tokens = np.random.default_rng(1).integers(0, 64, LENGTH + 1).astype(np.int32)
    logprobs = policy.learner.logprobs(policy.run_id, tokens, np.array([0, LENGTH + 1]))[1:]
    columns = {"weights": np.ones(LENGTH, np.float32), "logprobs": logprobs, "advantages": advantages}
    return DatumBatch(tokens[:-1], tokens[1:], np.array([0, LENGTH]), columns)


@pytest.fixture
def advantages() -> Array:
    return np.linspace(-1, 1, LENGTH).astype(np.float32)


def test_an_update_that_leaves_no_finite_numbers_is_named_with_step_and_learning_rate(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    policy = policy_of(tiny_model(True), "rl.optim.learning_rate=1e30", "rl.optim.grad_clip_norm=0")
    policy.publish()
    policy.step(on_policy(policy, advantages), 1)
    wanted = r"no finite log-probability; it made step 1 at learning rate 1e\+30 .*not clipped.*Lower"
    with pytest.raises(DivergedError, match=wanted):
        policy.publish()


def test_an_update_at_a_sane_learning_rate_is_published(tiny_model: Callable[[bool], Path], advantages: Array) -> None:
    policy = policy_of(tiny_model(True), "rl.optim.learning_rate=1e-2")
    policy.publish()
    assert policy.step(on_policy(policy, advantages), 1)["policy/grad_norm"] > 0
    assert np.isfinite(policy.publish().canary_new).all()


def test_a_policy_that_nothing_can_move_any_more_stops_the_run(tiny_model: Callable[[bool], Path]) -> None:
    policy = policy_of(tiny_model(True), "rl.optim.learning_rate=1e-2")
    certain = on_policy(policy, np.full(LENGTH, 1e-30, np.float32))  # gradients so small that their norm is 0
    with pytest.raises(DivergedError, match=r"step 7: .*gradient is exactly 0.*lower rl\.optim\.learning_rate"):
        policy.step(certain, 7)


def test_groups_that_agree_have_no_gradient_and_are_no_divergence(tiny_model: Callable[[bool], Path]) -> None:
    policy = policy_of(tiny_model(True))
    assert policy.step(on_policy(policy, np.zeros(LENGTH, np.float32)), 1)["policy/grad_norm"] == 0.0


def test_sampled_logprobs_that_are_not_finite_are_a_divergence_and_finite_ones_a_mismatch(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    policy = policy_of(tiny_model(True))
    batch = on_policy(policy, advantages)
    batch.columns["logprobs"][3] -= 2.0
    with pytest.raises(MismatchError, match=r"step 2: .*disagree"):
        policy.step(batch, 2)
    batch.columns["logprobs"][3] = np.nan
    with pytest.raises(DivergedError, match="step 2: learner or sampler gives tokens just sampled no finite"):
        policy.step(batch, 2)
    assert policy.learner.version(policy.run_id) == 0, "nothing was applied"


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_policy_restored_from_its_files_goes_on_to_the_bit(
    tiny_model: Callable[[bool], Path], advantages: Array, steps_before: int
) -> None:
    options = ("rl.optim.learning_rate=1e-2", "rl.optim.weight_decay=0.1", "rl.optim.grad_clip_norm=1.0")
    straight = policy_of(tiny_model(True), *options)
    for step in range(1, steps_before + 1):
        straight.step(on_policy(straight, advantages), step)
    files, digest = straight.state_files(), straight.digest()
    restored = policy_of(tiny_model(True), *options)
    restored.restore(files)
    assert restored.digest() == digest
    for policy in (straight, restored):
        policy.step(on_policy(policy, advantages), steps_before + 1)
    assert_same_bits(state(restored.learner, "unit"), state(straight.learner, "unit"))
    assert restored.learner.version("unit") == steps_before + 1
    assert restored.digest() == straight.digest() != digest
    assert restored.state_files() == straight.state_files()
    assert np.array_equal(restored.publish().canary_new, straight.publish().canary_new)


def test_files_of_another_section_or_with_a_wrong_byte_restore_nothing(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    policy = policy_of(tiny_model(True), "rl.optim.learning_rate=1e-2")
    files, before = policy.state_files(), policy.digest()
    policy.step(on_policy(policy, advantages), 1)
    after = policy.digest()
    assert after != before
    name = "adapter_model.safetensors"
    with pytest.raises(CheckpointError):
        policy.restore({**files, name: files[name][:-1] + b"?"})
    with pytest.raises(CheckpointError, match=r"rank 4"):
        policy_of(tiny_model(True), "lora.rank=2").restore(files)
    assert policy.digest() == after


def test_each_completion_is_joined_to_its_own_prompt() -> None:
    a, b, c, x, y, z, w = range(1, 8)
    rollouts = Rollouts(
        problems=np.array([4, 9]),
        prompt_tokens=np.array([a, b, c], np.int32),
        prompt_offsets=np.array([0, 2, 3]),
        group=np.array([0, 0, 1], np.int32),
        tokens=np.array([x, y, z, w], np.int32),
        logprobs=np.zeros(4, np.float32),
        versions=np.zeros(4, np.int32),
        offsets=np.array([0, 2, 3, 4]),
        stop_reasons=np.zeros(3, np.int8),
    )
    tokens, offsets, sampled = join_prompts(rollouts)
    assert tokens.tolist() == [a, b, x, y, a, b, z, c, w]
    assert offsets.tolist() == [0, 4, 7, 9] and tokens[sampled].tolist() == [x, y, z, w]
