"""Pieces become one optimizer step; a learning rate that explodes ends in one sentence that names the step and the
cause, not in NaNs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rlsys.config import JobConfig, parse_config
from rlsys.datums import DatumBatch, concatenate
from rlsys.errors import CheckpointError, DivergedError, MismatchError
from rlsys.learner.policy import Policy, cap_importance, join_prompts
from rlsys.rollouts import Rollouts
from rlsys.types import Array
from tests.unit.tiny_learner import assert_close, assert_same_bits, lend_for, run_bytes, state

CANARY = np.arange(1, 17, dtype=np.int32)
LENGTH = 12


def job(base: Path, *overrides: str) -> JobConfig:
    config = "run: {name: unit}\nlora: {rank: 4}\nrl: {optim: {warmup_steps: 0}}"
    return parse_config(config, [f"model.path={base}", "model.max_length=64", *overrides])


def policy_of(base: Path, *overrides: str) -> Policy:
    config = job(base, *overrides)
    return Policy(lend_for(base, config.model, config.learner), config, CANARY)


def learned(policy: Policy, batch: DatumBatch, step: int) -> dict[str, float]:
    """A whole step in one piece."""
    return policy.learn(batch, step, 0, first=True, last=True, on_policy=True)[1]


def on_policy(policy: Policy, advantages: Array, seed: int = 1) -> DatumBatch:
    """One datum whose log-probabilities are the policy's own."""
    tokens = np.random.default_rng(seed).integers(0, 64, LENGTH + 1).astype(np.int32)
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
    learned(policy, on_policy(policy, advantages), 1)
    wanted = r"no finite log-probability; it made step 1 at learning rate 1e\+30 .*not clipped.*Lower"
    with pytest.raises(DivergedError, match=wanted):
        policy.publish()


def test_an_update_at_a_sane_learning_rate_is_published(tiny_model: Callable[[bool], Path], advantages: Array) -> None:
    policy = policy_of(tiny_model(True), "rl.optim.learning_rate=1e-2")
    policy.publish()
    assert learned(policy, on_policy(policy, advantages), 1)["policy/grad_norm"] > 0
    assert np.isfinite(policy.publish().canary_new).all()


def test_a_policy_that_nothing_can_move_any_more_stops_the_run(tiny_model: Callable[[bool], Path]) -> None:
    policy = policy_of(tiny_model(True), "rl.optim.learning_rate=1e-2")
    certain = on_policy(policy, np.full(LENGTH, 1e-30, np.float32))  # gradients so small that their norm is 0
    with pytest.raises(DivergedError, match=r"step 7: .*gradient is exactly 0.*lower rl\.optim\.learning_rate"):
        learned(policy, certain, 7)


def test_groups_that_agree_have_no_gradient_and_are_no_divergence(tiny_model: Callable[[bool], Path]) -> None:
    policy = policy_of(tiny_model(True))
    assert learned(policy, on_policy(policy, np.zeros(LENGTH, np.float32)), 1)["policy/grad_norm"] == 0.0


def test_sampled_logprobs_that_are_not_finite_are_a_divergence_and_finite_ones_a_mismatch(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    policy = policy_of(tiny_model(True))
    batch = on_policy(policy, advantages)
    batch.columns["logprobs"][3] -= 2.0
    with pytest.raises(MismatchError, match=r"step 2: .*disagree"):
        learned(policy, batch, 2)
    batch.columns["logprobs"][3] = np.nan
    with pytest.raises(DivergedError, match="step 2: learner or sampler gives sampled tokens no finite"):
        learned(policy, batch, 2)
    assert policy.learner.runs.version(policy.run_id) == 0, "nothing was applied"


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_policy_restored_from_its_files_goes_on_to_the_bit(
    tiny_model: Callable[[bool], Path], advantages: Array, steps_before: int
) -> None:
    options = ("rl.optim.learning_rate=1e-2", "rl.optim.weight_decay=0.1", "rl.optim.grad_clip_norm=1.0")
    straight = policy_of(tiny_model(True), *options)
    for step in range(1, steps_before + 1):
        learned(straight, on_policy(straight, advantages), step)
    files, digest = straight.state_files(), straight.digest()
    restored = policy_of(tiny_model(True), *options)
    restored.restore(files)
    assert restored.digest() == digest
    for policy in (straight, restored):
        learned(policy, on_policy(policy, advantages), steps_before + 1)
    assert_same_bits(state(restored.learner, "unit"), state(straight.learner, "unit"))
    assert restored.learner.runs.version("unit") == steps_before + 1
    assert restored.digest() == straight.digest() != digest
    assert restored.state_files() == straight.state_files()
    assert np.array_equal(restored.publish().canary_new, straight.publish().canary_new)


def test_files_of_another_section_or_with_a_wrong_byte_restore_nothing(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    policy = policy_of(tiny_model(True), "rl.optim.learning_rate=1e-2")
    files, before = policy.state_files(), policy.digest()
    learned(policy, on_policy(policy, advantages), 1)
    after = policy.digest()
    assert after != before
    name = "adapter_model.safetensors"
    with pytest.raises(CheckpointError):
        policy.restore({**files, name: files[name][:-1] + b"?"})
    with pytest.raises(CheckpointError, match=r"rank 4"):
        policy_of(tiny_model(True), "lora.rank=2").restore(files)
    assert policy.digest() == after


FREE = ("rl.optim.learning_rate=1e-2", "rl.optim.grad_clip_norm=0")


def test_gradients_of_pieces_add_up_to_the_one_of_the_whole_batch(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    whole, cut = (policy_of(tiny_model(True), *FREE) for _ in range(2))
    pieces = [on_policy(whole, advantages, seed) for seed in (1, 2)]
    of_whole = learned(whole, concatenate(pieces), 1)
    logprobs, metrics = cut.learn(pieces[0], 1, 0, first=True, last=False, on_policy=True)
    assert "policy/grad_norm" not in metrics and cut.learner.runs.version("unit") == 0
    np.testing.assert_allclose(logprobs, pieces[0].columns["logprobs"], atol=1e-6)
    _, last = cut.learn(pieces[1], 1, 0, first=False, last=True, on_policy=True)
    assert last["policy/grad_norm"] == pytest.approx(of_whole["policy/grad_norm"], rel=1e-5)
    assert metrics["loss/sum"] + last["loss/sum"] == pytest.approx(of_whole["loss/sum"], rel=1e-5)
    assert metrics["policy/tokens"] + last["policy/tokens"] == of_whole["policy/tokens"] == 2 * LENGTH
    assert_close(cut.learner.runs.state("unit").weights, whole.learner.runs.state("unit").weights, 1e-4)


def test_a_substep_without_datums_is_no_step_and_one_whose_last_piece_has_none_is(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    policy = policy_of(tiny_model(True), *FREE)
    batch = on_policy(policy, advantages)
    nothing = DatumBatch(
        batch.tokens[:0], batch.targets[:0], np.zeros(1, np.int64), dict.fromkeys(batch.columns, advantages[:0])
    )
    logprobs, metrics = policy.learn(nothing, 1, 0, first=True, last=True, on_policy=True)
    assert len(logprobs) == 0 and policy.learner.runs.version("unit") == 0
    assert metrics == {"policy/tokens": 0, "policy/learning_rate": pytest.approx(1e-2), "policy/version": 0}
    policy.learn(batch, 2, 0, first=True, last=False, on_policy=True)
    _, metrics = policy.learn(nothing, 2, 0, first=False, last=True, on_policy=True)
    assert policy.learner.runs.version("unit") == 1 and metrics["policy/grad_norm"] > 0


def test_what_a_substep_that_was_given_up_left_behind_counts_no_more(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    straight, again = (policy_of(tiny_model(True), *FREE) for _ in range(2))
    batch = on_policy(straight, advantages)
    again.learn(batch, 1, 0, first=True, last=False, on_policy=True)
    assert learned(again, batch, 1) == learned(straight, batch, 1)
    assert again.digest() == straight.digest()


def test_only_what_is_on_policy_has_to_agree_with_the_sampler(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    policy = policy_of(tiny_model(True), *FREE, "rl.substeps=2")
    batch = on_policy(policy, advantages)
    batch.columns["logprobs"][:] -= 0.5
    policy.learn(batch, 1, 0, first=True, last=True, on_policy=False)
    policy.learn(batch, 1, 1, first=True, last=True, on_policy=True)
    with pytest.raises(MismatchError):
        policy.learn(batch, 2, 0, first=True, last=True, on_policy=True)
    batch.columns["logprobs"][3] = np.nan
    with pytest.raises(DivergedError):
        policy.learn(batch, 2, 0, first=True, last=True, on_policy=False)


def test_a_batch_that_is_clipped_whole_has_no_gradient_and_is_no_divergence(tiny_model: Callable[[bool], Path]) -> None:
    policy = policy_of(tiny_model(True), *FREE, "rl.loss.name=ppo")
    batch = on_policy(policy, np.ones(LENGTH, np.float32))
    batch.columns["logprobs"][:] -= 0.5  # r = 1.65, above 1.2
    _, metrics = policy.learn(batch, 1, 0, first=True, last=True, on_policy=False)
    assert (metrics["policy/grad_norm"], metrics["policy/clip_fraction"]) == (0, 1)


def test_the_cap_bounds_each_tokens_correction_by_hand() -> None:
    log = np.log(np.array([0.5, 0.5, 0.5, 0.9], np.float32))
    q = np.log(np.array([0.2, 0.4, 1.0, 0.1], np.float32))
    columns = {"weights": np.array([1, 1, 1, 0], np.float32), "logprobs": q, "advantages": np.ones(4, np.float32)}
    batch = DatumBatch(np.zeros(4, np.int32), np.zeros(4, np.int32), np.array([0, 4]), columns)
    capped, share = cap_importance(batch, log, 2.0)
    # p_old / q = 2.5, 1.25, 0.5: the first is cut to 2; the fourth token does not count
    assert capped.columns["weights"].tolist() == pytest.approx([2.0, 1.25, 0.5, 0.0])
    assert capped.columns["logprobs"].tolist() == [*log[:3].tolist(), 0.0]
    assert share == pytest.approx(1 / 3)
    assert capped.columns["advantages"] is batch.columns["advantages"]


def test_the_cap_bounds_the_gradient(tiny_model: Callable[[bool], Path], advantages: Array) -> None:
    plain, capped = policy_of(tiny_model(True), *FREE), policy_of(tiny_model(True), *FREE, "rl.loss.importance_cap=2")
    batch = on_policy(plain, advantages)
    wanted = learned(plain, batch, 1)["policy/grad_norm"]
    batch.columns["logprobs"][:] -= 1.0  # p / q = e
    _, metrics = capped.learn(batch, 1, 0, first=True, last=True, on_policy=False)
    assert metrics["policy/grad_norm"] == pytest.approx(2 * wanted, rel=1e-4)
    assert metrics["policy/capped_share"] == 1
    assert metrics["policy/logprob_diff_mean"] == pytest.approx(1.0, abs=1e-4), "of the sampler"
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5), "of the update"


def test_with_a_cap_later_substeps_compare_with_the_weights_from_before_the_step(
    tiny_model: Callable[[bool], Path], advantages: Array
) -> None:
    policy = policy_of(tiny_model(True), *FREE, "rl.loss.importance_cap=2", "rl.substeps=2")
    batch = on_policy(policy, advantages)
    for step in (1, 2):
        before, _ = policy.learn(batch, step, 0, first=True, last=True, on_policy=False)
        after, metrics = policy.learn(batch, step, 1, first=True, last=True, on_policy=False)
        gap = after.astype(np.float64) - before
        assert np.abs(gap).max() > 1e-3
        assert metrics["policy/ratio_mean"] == pytest.approx(np.exp(gap).mean(), rel=1e-5)
        apart = np.abs(before - batch.columns["logprobs"]).mean()
        assert metrics["policy/logprob_diff_mean"] == pytest.approx(apart, abs=1e-6)


TWO_PROMPTS = Rollouts(
    problems=np.array([4, 9]),
    prompt_tokens=np.array([1, 2, 3], np.int32),
    prompt_offsets=np.array([0, 2, 3]),
    group=np.array([0, 0, 1], np.int32),
    tokens=np.array([4, 5, 6, 7], np.int32),
    logprobs=np.zeros(4, np.float32),
    versions=np.zeros(4, np.int32),
    offsets=np.array([0, 2, 3, 4]),
    stop_reasons=np.zeros(3, np.int8),
)
REFRESHED = (*FREE, "rl.advantages={kl_coef: 0.1, reference_refresh_steps: 2}")


def own_logprobs(policy: Policy) -> Array:
    tokens, offsets, sampled = join_prompts(TWO_PROMPTS)
    return policy.learner.logprobs(policy.run_id, tokens, offsets)[sampled]


def test_the_policy_becomes_the_reference_every_so_often(tiny_model: Callable[[bool], Path], advantages: Array) -> None:
    policy = policy_of(tiny_model(True), *REFRESHED)
    references, own = [policy.reference(TWO_PROMPTS)], [own_logprobs(policy)]
    for step in range(1, 5):
        learned(policy, on_policy(policy, advantages), step)
        references.append(policy.reference(TWO_PROMPTS))
        own.append(own_logprobs(policy))
    # the base up to step 1, the policy after step 2 from there, after step 4 from there
    for step, of in ((0, 0), (1, 0), (2, 2), (3, 2), (4, 4)):
        assert references[step].tolist() == own[of].tolist(), step
    assert all(np.abs(own[step] - own[0]).max() > 1e-3 for step in range(1, 5))


@pytest.mark.parametrize("steps_before", [1, 3])
def test_a_restored_policy_has_the_reference_it_had(
    tiny_model: Callable[[bool], Path], advantages: Array, steps_before: int
) -> None:
    straight, restored = policy_of(tiny_model(True), *REFRESHED), policy_of(tiny_model(True), *REFRESHED)
    for step in range(1, 3):  # one that goes back has a reference of its own, which must not stay
        learned(restored, on_policy(restored, advantages, seed=5), step)
    for step in range(1, steps_before + 1):
        learned(straight, on_policy(straight, advantages), step)
    files = straight.state_files()
    assert any(name.startswith("reference.") for name in files) == (steps_before >= 2)
    restored.restore(files)
    assert restored.reference(TWO_PROMPTS).tolist() == straight.reference(TWO_PROMPTS).tolist()
    for policy in (straight, restored):
        learned(policy, on_policy(policy, advantages), steps_before + 1)
    assert restored.reference(TWO_PROMPTS).tolist() == straight.reference(TWO_PROMPTS).tolist()
    assert restored.state_files() == straight.state_files()


def test_a_reference_costs_its_weights_alone(tiny_model: Callable[[bool], Path], advantages: Array) -> None:
    policy = policy_of(tiny_model(True), *REFRESHED)
    for step in (1, 2):
        learned(policy, on_policy(policy, advantages), step)
    own, reference = (run_bytes(policy.learner, run_id) for run_id in ("unit", "unit/reference"))
    assert (reference.weights, reference.gradient, reference.optimizer) == (own.weights, 0, 0)


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
