"""Group advantages and the KL penalty, against what is true of them by mathematics."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.advantages import discounted_future_sum, fold_kl, group_advantages, groups_without_gradient, to_minibatches
from rlsys.config import AdvantageSection, OverlongSection, RlSection, SamplingSection
from rlsys.datums import DatumBatch, concatenate, take
from rlsys.errors import ConfigError, DatumError
from rlsys.rollouts import ENVIRONMENT, LENGTH, Rollouts, offsets_of
from rlsys.run_state.ledger import AGREED, EMPTY, TRAINED

MEAN = AdvantageSection()
RLOO = AdvantageSection(baseline="leave_one_out")
GRPO = AdvantageSection(normalise="std")


def made(lengths, group, seed=0) -> Rollouts:
    """Completions of the given lengths, prompts of two tokens."""
    rng = np.random.default_rng(seed)
    T, P = sum(lengths), max(group) + 1
    return Rollouts(
        problems=np.arange(P),
        prompt_tokens=rng.integers(0, 50, 2 * P).astype(np.int32),
        prompt_offsets=offsets_of([2] * P),
        group=np.array(group, np.int32),
        tokens=rng.integers(0, 50, T).astype(np.int32),
        logprobs=-rng.exponential(1.0, T).astype(np.float32),
        versions=np.zeros(T, np.int32),
        offsets=offsets_of(lengths),
        stop_reasons=np.zeros(len(lengths), np.int8),
    )


def to_datums(rollouts, rewards, section=MEAN, reference=None, **options) -> tuple[DatumBatch, dict[str, float]]:
    """All in one piece."""
    (batch,), _, facts, _ = to_minibatches(rollouts, rewards, RlSection(advantages=section, **options), 1, reference)
    return batch, facts


groups_of_rewards = st.lists(
    st.lists(st.floats(-100, 100, allow_nan=False), min_size=2, max_size=8), min_size=1, max_size=5
)


def flat(groups):
    rewards = np.array([reward for group in groups for reward in group])
    return rewards, np.repeat(np.arange(len(groups)), [len(group) for group in groups])


@given(groups=groups_of_rewards)
@settings(max_examples=60, deadline=None)
def test_group_advantages_sum_to_zero(groups):
    rewards, group = flat(groups)
    for section in (MEAN, RLOO, GRPO):
        advantages, _ = group_advantages(rewards, group, section)
        assert advantages.dtype == np.float32
        np.testing.assert_allclose(np.bincount(group, advantages), 0, atol=2e-4)


@given(groups=groups_of_rewards)
@settings(max_examples=60, deadline=None)
def test_each_group_is_treated_alone_and_as_the_papers_say(groups):
    rewards, group = flat(groups)
    for section in (MEAN, RLOO, GRPO):
        advantages, agreeing = group_advantages(rewards, group, section)
        for g, r in enumerate(map(np.array, groups)):
            n = len(r)
            wanted = r - r.mean()
            if section is RLOO:
                wanted = np.array([r[i] - np.delete(r, i).mean() for i in range(n)])
            if section is GRPO:
                wanted = wanted / (r.std(ddof=1) + 1e-6)
            if len(set(r.tolist())) == 1:
                wanted = np.zeros(n)
            np.testing.assert_allclose(advantages[group == g], wanted, rtol=1e-5, atol=1e-5)
            assert (agreeing[group == g] == (len(set(r.tolist())) == 1)).all()


def test_leave_one_out_is_the_centred_reward_stretched():
    rewards, group = np.array([1.0, 0.0, 0.0, 1.0, 1.0]), np.zeros(5, int)
    centred, _ = group_advantages(rewards, group, MEAN)
    np.testing.assert_allclose(group_advantages(rewards, group, RLOO)[0], centred * 5 / 4, rtol=1e-6)


@pytest.mark.parametrize("section", [MEAN, RLOO, GRPO])
def test_a_group_that_agrees_teaches_nothing(section):
    rewards = np.array([0.1, 0.1, 0.1, 0.0, 1.0, 0.1])  # 0.1 is no binary fraction: its mean of three is not 0.1
    group = np.array([0, 0, 0, 1, 1, 1])
    advantages, agreeing = group_advantages(rewards, group, section)
    assert (advantages[:3] == 0).all()
    assert (advantages[3:] != 0).all()
    assert agreeing.tolist() == [True, True, True, False, False, False]


def test_rounding_is_not_blown_up_by_the_normalisation():
    rewards = np.array([0.1 + 0.2, 0.3])
    advantages, agreeing = group_advantages(rewards, np.zeros(2, int), GRPO)
    assert not agreeing.any()
    assert np.abs(advantages).max() < 1e-9


def test_rewards_far_from_zero_keep_their_differences():
    advantages, _ = group_advantages(np.array([1e9, 1e9 + 1]), np.zeros(2, int), MEAN)
    assert advantages.tolist() == [-0.5, 0.5]


def test_group_numbers_may_have_gaps():
    advantages, _ = group_advantages(np.array([0.0, 1.0, 5.0, 7.0]), np.array([3, 3, 90, 90]), MEAN)
    assert advantages.tolist() == [-0.5, 0.5, -1.0, 1.0]


def test_what_cannot_be_centred_is_refused():
    with pytest.raises(ConfigError, match="found a group of one, completion 2; wanted at least two"):
        group_advantages(np.array([0.0, 1.0, 1.0]), np.array([0, 0, 1]), RLOO)
    with pytest.raises(DatumError, match="rewards: found nan for completion 1; wanted finite"):
        group_advantages(np.array([0.0, np.nan]), np.zeros(2, int), MEAN)
    advantages, agreeing = group_advantages(np.array([1.0]), np.zeros(1, int), GRPO)
    assert (advantages.tolist(), agreeing.tolist()) == ([0.0], [True])


def test_the_kl_penalty_is_the_published_formula():
    rollouts = made([3, 1, 4], [0, 0, 0])
    rng = np.random.default_rng(1)
    q, A, reference = rollouts.logprobs, rng.normal(size=8), -rng.exponential(1.0, 8)
    d = q.astype(np.float64) - reference
    got, mean = fold_kl(A, q, reference, rollouts.offsets, 0.3)
    assert mean == pytest.approx(d.mean())
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, A + 0.3 * (d.mean() - d), rtol=1e-5, atol=1e-6)
    assert (got - A).sum() == pytest.approx(0, abs=1e-5)  # it moves advantage between tokens and adds none
    w = np.array([1, 0, 1, 1, 0, 1, 1, 1.0])
    got, mean = fold_kl(A, q, np.where(w, reference, np.nan), rollouts.offsets, 0.3, weights_T=w)
    assert mean == pytest.approx(d[w == 1].mean())
    np.testing.assert_allclose(got, A + 0.3 * w * (d[w == 1].mean() - d), rtol=1e-5, atol=1e-6)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    discount=st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_discounted_sum_stays_within_a_completion(lengths, discount, seed):
    values = np.random.default_rng(seed).normal(size=sum(lengths))
    wanted = values.copy()
    offsets = offsets_of(lengths)
    for start, end in pairwise(offsets):
        for t in range(end - 2, start - 1, -1):
            wanted[t] += discount * wanted[t + 1]
    np.testing.assert_allclose(discounted_future_sum(values, offsets, discount), wanted, rtol=1e-12, atol=1e-12)


def test_the_discount_applies_to_the_penalty_alone():
    rollouts = made([3, 2], [0, 0])
    A, reference = np.arange(5.0), rollouts.logprobs - np.array([1, 2, 3, 4, 5.0])
    got, mean = fold_kl(A, rollouts.logprobs, reference, rollouts.offsets, 0.1, discount=0.5)
    adjustment = 0.1 * np.array([2, 1, 0, -1, -2.0])
    first = adjustment[:3] @ [[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]]
    second = adjustment[3:] @ [[1, 0], [0.5, 1]]
    wanted = A + np.concatenate([first, second])
    assert mean == pytest.approx(3, abs=1e-6)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_to_datums_drops_agreeing_groups_whole():
    rollouts = made([3, 1, 4, 2], [0, 0, 1, 1])
    batch, metrics = to_datums(rollouts, np.array([1.0, 1.0, 0.0, 1.0]), MEAN)
    assert batch.lengths.tolist() == [5, 3]  # prompt 2 + completion - 1, of the second group only
    assert batch.columns["advantages"].tolist() == [0, *[-0.5] * 4, 0, *[0.5] * 2]
    assert metrics == {
        "reward/mean": 0.75,
        "reward/std": pytest.approx(np.sqrt(3) / 4),
        "reward/completions": 4,
        "reward/groups": 2,
        "reward/agreeing_groups": 1,
        "sampler/version_mean": 0,
        "sampler/version_min": 0,
        "advantages/mean_abs": pytest.approx(0.3),
        "policy/tokens": 6,
        "datums/count": 2,
        "datums/tokens": 8,
    }


def test_agreeing_groups_are_kept_by_choice_and_with_a_kl_penalty():
    rollouts, rewards = made([3, 1, 4, 2], [0, 0, 1, 1]), np.array([1.0, 1.0, 0.0, 1.0])
    batch, metrics = to_datums(rollouts, rewards, AdvantageSection(drop_agreeing=False))
    assert batch.num_datums == metrics["datums/count"] == 4
    section = AdvantageSection(kl_coef=0.1, drop_agreeing=True)
    batch, metrics = to_datums(rollouts, rewards, section, rollouts.logprobs - np.arange(10))
    assert batch.num_datums == 4
    assert metrics["policy/kl_reference"] == pytest.approx(4.5, abs=1e-6)
    assert metrics["reward/agreeing_groups"] == 1
    np.testing.assert_allclose(batch.columns["advantages"][1:4], 0.1 * (4.5 - np.arange(3)), atol=1e-6)


@pytest.mark.parametrize("section", [MEAN, RLOO, GRPO])
def test_all_groups_agreeing_leaves_a_valid_batch_of_none(section):
    batch, metrics = to_datums(made([3, 1, 4, 2], [0, 0, 1, 1]), np.array([1.0, 1.0, 0.0, 0.0]), section)
    assert batch.num_datums == metrics["datums/count"] == metrics["datums/tokens"] == 0
    assert metrics["reward/agreeing_groups"] == metrics["reward/groups"] == 2
    assert metrics["advantages/mean_abs"] == 0


def test_reference_logprobs_come_exactly_with_a_coefficient():
    rollouts, rewards = made([3, 1], [0, 0]), np.array([0.0, 1.0])
    kl = AdvantageSection(kl_coef=0.1)
    with pytest.raises(DatumError, match=r"found none, with kl_coef 0\.1; wanted one per completion token"):
        to_datums(rollouts, rewards, kl)
    with pytest.raises(DatumError, match="found some, with kl_coef 0; wanted none"):
        to_datums(rollouts, rewards, MEAN, rollouts.logprobs)
    with pytest.raises(DatumError, match=r"found shape \(3,\); wanted \(4,\)"):
        to_datums(rollouts, rewards, kl, rollouts.logprobs[:3])
    broken = rollouts.logprobs.copy()
    broken[2] = -np.inf
    with pytest.raises(DatumError, match="completion token 2 of the batch: found -inf"):
        to_datums(rollouts, rewards, kl, broken)


def test_rewards_and_completions_have_to_pair_up():
    with pytest.raises(DatumError, match="rewards: found 1 for 2 completions"):
        to_datums(made([3, 1], [0, 0]), np.array([0.0]), MEAN)


def outcomes(rollouts, rewards, section=MEAN, **options) -> list[int]:
    reference = np.zeros(len(rollouts.tokens)) if section.kl_coef else None
    return to_minibatches(rollouts, rewards, RlSection(advantages=section, **options), 2, reference)[3].tolist()


def test_the_outcome_of_each_group_says_whether_it_became_datums_and_why_not():
    rollouts = made([2, 1, 3, 1, 0, 0, 2, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    rewards = np.array([0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    assert outcomes(rollouts, rewards) == [TRAINED, AGREED, EMPTY, TRAINED]
    batch, _ = to_datums(rollouts, rewards)
    assert batch.num_datums == 3, "two of group 0, none of 1 and 2, one of 3: its other completion has no token"
    assert outcomes(rollouts, rewards, AdvantageSection(drop_agreeing=False)) == [TRAINED, TRAINED, EMPTY, TRAINED]
    assert outcomes(rollouts, rewards, AdvantageSection(kl_coef=0.1)) == [TRAINED, TRAINED, EMPTY, TRAINED]
    rollouts.stop_reasons[[0, 1, 6]] = LENGTH
    mask = OverlongSection(handling="mask")
    assert outcomes(rollouts, rewards, overlong=mask) == [EMPTY, AGREED, EMPTY, EMPTY], "nothing of them is left"


def test_what_an_environment_wrote_is_in_no_mean_and_has_no_advantage():
    rollouts = made([4, 2], [0, 0])
    rollouts.versions[:] = [3, ENVIRONMENT, ENVIRONMENT, 5, 4, 4]
    rewards, reference = np.array([1.0, 0.0]), rollouts.logprobs - np.array([1, np.nan, 99, 3, 5, 7])
    batch, facts = to_datums(rollouts, rewards, AdvantageSection(kl_coef=0.5), reference)
    assert facts["policy/kl_reference"] == pytest.approx((1 + 3 + 5 + 7) / 4, abs=1e-6)
    wanted = [0, 0.5 + 0.5 * 3, 0, 0, 0.5 + 0.5 * 1, 0, -0.5 + 0.5 * -1, -0.5 + 0.5 * -3]
    np.testing.assert_allclose(batch.columns["advantages"], wanted, atol=1e-6)
    assert batch.columns["weights"].tolist() == [0, 1, 0, 0, 1, 0, 1, 1]
    assert (facts["sampler/version_mean"], facts["sampler/version_min"], facts["policy/tokens"]) == (4, 3, 4)
    assert facts["advantages/mean_abs"] == pytest.approx((2 + 1 + 1 + 2) / 4)
    batch, _ = to_datums(rollouts, rewards, AdvantageSection(aggregate="length"))
    # each completion has two tokens of the model's own
    assert batch.columns["advantages"].tolist() == [0, 0.25, 0, 0, 0.25, 0, -0.25, -0.25]


shapes = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=4), min_size=1, max_size=6)


@given(shape=shapes, pieces=st.integers(1, 8), seed=st.integers(0, 99), aggregate=st.sampled_from(["sum", "length"]))
@settings(max_examples=60, deadline=None)
def test_pieces_end_to_end_are_the_one_batch_and_name_their_completions(shape, pieces, seed, aggregate):
    rng = np.random.default_rng(seed)
    lengths = [length for group in shape for length in group]
    rollouts = made(lengths, np.repeat(np.arange(len(shape)), [len(group) for group in shape]).tolist(), seed)
    rollouts.versions[rng.random(len(rollouts.tokens)) < 0.3] = ENVIRONMENT
    rewards = rng.integers(0, 2, len(lengths)).astype(float)
    rl = RlSection(advantages=AdvantageSection(aggregate=aggregate))
    (whole,), (all_rows,), facts, settled = to_minibatches(rollouts, rewards, rl, 1)
    batches, rows, facts_of_pieces, settled_of_pieces = to_minibatches(rollouts, rewards, rl, pieces)
    assert len(batches) == len(rows) == pieces
    assert facts_of_pieces == facts and settled_of_pieces.tolist() == settled.tolist()
    assert np.concatenate(rows).tolist() == all_rows.tolist()
    joined = concatenate(batches)
    assert joined.tokens.tolist() == whole.tokens.tolist() and joined.offsets.tolist() == whole.offsets.tolist()
    for key, column in whole.columns.items():
        assert joined.columns[key].tolist() == column.tolist()
    shares = np.array_split(np.arange(len(shape)), pieces)
    for batch, of, share in zip(batches, rows, shares, strict=True):
        assert set(rollouts.group[of].tolist()) <= set(share.tolist()), "groups go in draw order, as np.array_split"
        for d, r in enumerate(of):
            assert take(batch, [d]).targets[1:].tolist() == rollouts.completion(r).tolist()


def test_each_piece_has_a_kl_mean_of_its_own():
    rollouts, rewards = made([1, 1, 1, 1], [0, 0, 1, 1]), np.array([1.0, 0.0, 1.0, 0.0])
    reference = rollouts.logprobs - np.array([1, 3, 5, 9.0])  # d; its means are 2 and 7, of all 4.5
    rl = RlSection(advantages=AdvantageSection(kl_coef=0.1))
    batches, _, facts, _ = to_minibatches(rollouts, rewards, rl, 2, reference)
    found = [batch.columns["advantages"][batch.columns["weights"] > 0] for batch in batches]
    np.testing.assert_allclose(found, [[0.5 + 0.1, -0.5 - 0.1], [0.5 + 0.2, -0.5 - 0.2]], atol=1e-6)
    assert facts["policy/kl_reference"] == pytest.approx(4.5, abs=1e-6)


@given(shape=shapes, seed=st.integers(0, 99), limit=st.integers(5, 50))
@settings(max_examples=60, deadline=None)
def test_aggregates_divide_the_same_advantages_each_by_its_own_count(shape, seed, limit):
    lengths = [length for group in shape for length in group]
    rollouts = made(lengths, np.repeat(np.arange(len(shape)), [len(group) for group in shape]).tolist(), seed)
    rng = np.random.default_rng(seed)
    rewards, reference = rng.normal(size=len(lengths)), -rng.exponential(1.0, len(rollouts.tokens))
    found = {}
    for aggregate in ("sum", "length", "max_tokens"):
        section = AdvantageSection(aggregate=aggregate, kl_coef=0.2, kl_discount=0.5)
        batch, _ = to_datums(rollouts, rewards, section, reference, sampling=SamplingSection(max_tokens=limit))
        found[aggregate] = batch.columns["advantages"]
    tokens = np.repeat([length for length in lengths if length], [length + 1 for length in lengths if length])
    np.testing.assert_allclose(found["length"] * tokens, found["sum"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["max_tokens"] * limit, found["sum"], rtol=1e-5, atol=1e-6)


def test_a_masked_completion_is_in_the_baseline_and_in_no_datum():
    rollouts, rewards = made([2, 1, 1], [0, 0, 0]), np.array([0.0, 1.0, 0.5])
    rollouts.stop_reasons[0] = LENGTH
    kept, _ = to_datums(rollouts, rewards)
    masked, facts = to_datums(rollouts, rewards, overlong=OverlongSection(handling="mask"))
    assert kept.num_datums == 3 and masked.num_datums == facts["datums/count"] == 2
    assert masked.columns["advantages"].tolist() == take(kept, [1, 2]).columns["advantages"].tolist() == [0, 0.5, 0, 0]
    assert facts["reward/mean"] == 0.5


def test_without_a_baseline_the_advantage_is_the_reward():
    rewards, section = np.array([1.0, 1.0, 0.0, 0.5]), AdvantageSection(baseline="none", drop_agreeing=False)
    advantages, agreeing = group_advantages(rewards, np.array([0, 0, 1, 1]), section)
    assert (advantages.tolist(), agreeing.tolist()) == (rewards.tolist(), [True, True, False, False])
    with pytest.raises(ValueError, match="with baseline: none set normalise: none"):
        AdvantageSection(baseline="none", normalise="std")


def test_without_a_baseline_groups_that_are_all_right_are_learned_from_and_those_without_reward_left_out():
    rollouts, none = made([3, 1, 4, 2, 2, 2], [0, 0, 1, 1, 2, 2]), AdvantageSection(baseline="none")
    rewards = np.array([1.0, 1.0, 0.0, 0.0, -1.0, -1.0])
    batch, metrics = to_datums(rollouts, rewards, none)
    assert batch.lengths.tolist() == [4, 2, 3, 3], "a prompt of 2 + completions of 3, 1, 2 and 2 tokens - 1"
    assert batch.columns["advantages"].tolist() == [0, 1, 1, 1, 0, 1, 0, -1, -1, 0, -1, -1]
    assert metrics["reward/agreeing_groups"] == 3
    assert outcomes(rollouts, rewards, none) == [TRAINED, AGREED, TRAINED]
    assert outcomes(rollouts, rewards) == [AGREED, AGREED, AGREED]
    whole = AdvantageSection(baseline="none", drop_agreeing=False)
    assert outcomes(rollouts, rewards, whole) == [TRAINED, TRAINED, TRAINED]


def test_groups_are_replaced_where_they_teach_nothing_and_only_there():
    rewards, group = np.array([1.0, 1.0, 0.0, 0.0, -1.0, 1.0, 0.0, 2.0]), np.repeat(np.arange(4), 2)
    assert groups_without_gradient(rewards, group, 4, MEAN).tolist() == [True, True, False, False]
    none = AdvantageSection(baseline="none")
    assert groups_without_gradient(rewards, group, 4, none).tolist() == [False, True, False, False]
