"""Terms of the reward, against values worked out by hand and what is true of them by mathematics."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config import OverlongSection, RewardSection
from rlsys.errors import GradingError
from rlsys.rewards.total_reward import brevity, forms, overlong_share, total_rewards
from rlsys.rollouts import ENVIRONMENT, Rollouts, offsets_of

KEEP = OverlongSection()


def made(lengths, group) -> Rollouts:
    T, P = sum(lengths), max(group) + 1
    return Rollouts(
        problems=np.arange(P),
        prompt_tokens=np.zeros(P, np.int32),
        prompt_offsets=offsets_of([1] * P),
        group=np.array(group, np.int32),
        tokens=np.zeros(T, np.int32),
        logprobs=np.zeros(T, np.float32),
        versions=np.zeros(T, np.int32),
        offsets=offsets_of(lengths),
        stop_reasons=np.zeros(len(lengths), np.int8),
    )


def test_the_grade_alone_is_the_reward_by_default():
    rewards, metrics = total_rewards(np.array([1.0, 0.25]), made([2, 3], [0, 0]), ["a", "b"], RewardSection(), KEEP, 8)
    assert rewards.dtype == np.float32 and rewards.tolist() == [1.0, 0.25]
    # mean (1 + 1/4) / 2, spread half their distance
    assert metrics == {"reward/correct": 0.625, "reward/mean": 0.625, "reward/std": 0.375}


def test_what_is_right_for_the_length_term_is_the_jobs_to_say():
    rollouts = made([4, 8], [0, 0])
    section = RewardSection(length=1.0, solved_at=-3.0)
    rewards, _ = total_rewards(np.array([-2.5, -5.0]), rollouts, ["a", "b"], section, KEEP, 8)
    assert rewards.tolist() == [-2.5 + 0.5, -5.0 - 0.5]
    wrong, _ = total_rewards(np.array([-3.5, -5.0]), rollouts, ["a", "b"], section, KEEP, 8)
    assert wrong.tolist() == [-3.5, -5.0 - 0.5], "short and wrong is no better"


def test_a_reward_that_weights_make_too_large_is_refused_with_its_problem():
    section = RewardSection(correct=1e30)
    with pytest.raises(GradingError, match=r"problem 0: found a reward of -1e\+40, from a grade of -1e\+10"):
        total_rewards(np.array([1.0, -1e10]), made([2, 3], [0, 0]), ["a", "b"], section, KEEP, 8)


def test_all_terms_by_hand():
    rollouts = made([4, 6, 8, 10], [0, 0, 0, 0])
    texts = [r"\boxed{1}", "no answer", "#### 2", r"\boxed{3}"]
    section = RewardSection(correct=2.0, format=0.5, length=0.25)
    overlong = OverlongSection(handling="penalty", buffer_tokens=4, penalty=0.8)
    rewards, metrics = total_rewards(np.array([1.0, 0.0, 1.0, 0.5]), rollouts, texts, section, overlong, 10)
    # grade * 2               2     0      2     1
    # form * 0.5              0.5   0      0.5   0.5
    # lambda = 0.5 - (len - 4) / 6: 1/2, 1/6, -1/6, -1/2; what is not wholly right gets min(0, lambda)
    # length * 0.25           1/8   0     -1/24  -1/8
    # (len - 6) / 4: 0, 0, 1/2, 1, times -0.8
    # overlong                0     0     -0.4   -0.8
    assert rewards.tolist() == pytest.approx([2.625, 0.0, 2.1 - 1 / 24, 0.7 - 1 / 8])
    assert metrics["reward/correct"] == pytest.approx(5 / 4)
    assert metrics["reward/format"] == pytest.approx(1.5 / 4)
    assert metrics["reward/length"] == pytest.approx((1 / 8 - 1 / 24 - 1 / 8) / 4)
    assert metrics["reward/overlong"] == pytest.approx(-1.2 / 4)
    assert metrics["reward/mean"] == pytest.approx(rewards.mean())
    assert metrics["reward/format_timeouts"] == 0


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    weights=st.tuples(*[st.sampled_from([0.0, 0.5, 2.0])] * 3),
    penalty=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_terms_curves_add_up_to_the_mean_reward(lengths, weights, penalty, seed):
    rng = np.random.default_rng(seed)
    correct, form, length = weights
    section = RewardSection(correct=correct, format=form, length=length, format_pattern="x")
    overlong = OverlongSection(handling="penalty", buffer_tokens=5) if penalty else KEEP
    rollouts = made(lengths, sorted(rng.integers(0, 3, len(lengths)).tolist()))
    texts = [str(rng.choice(["x", "y"])) for _ in lengths]
    rewards, metrics = total_rewards(rng.random(len(lengths)), rollouts, texts, section, overlong, 20)
    names = {"reward/correct", "reward/format", "reward/length", "reward/overlong"} & metrics.keys()
    assert sum(metrics[name] for name in names) == pytest.approx(metrics["reward/mean"], abs=1e-9)
    assert metrics["reward/mean"] == pytest.approx(rewards.mean(dtype=np.float64), abs=1e-6)  # which are float32
    used = {"reward/correct"} | {f"reward/{name}" for name, on in (("format", form), ("length", length)) if on}
    assert names == used | ({"reward/overlong"} if penalty else set())


@given(
    groups=st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=4
    )
)
@settings(max_examples=60, deadline=None)
def test_brevity_is_of_each_group_alone_and_never_rewards_what_is_wrong(groups):
    lengths = np.array([length for group in groups for length, _ in group])
    correct = np.array([right for group in groups for _, right in group])
    group = np.repeat(np.arange(len(groups)), [len(of) for of in groups])
    found = brevity(lengths, correct, group)
    assert (np.abs(found) <= 0.5).all() and (found[~correct] <= 0).all()
    for g, of in enumerate(groups):
        mine = [length for length, _ in of]
        for i, (length, right) in enumerate(of):
            span = max(mine) - min(mine)
            wanted = 0.5 - (length - min(mine)) / span if span else 0.0
            assert found[group == g][i] == pytest.approx(wanted if right else min(0.0, wanted))


def test_brevity_counts_what_the_model_wrote_and_the_penalty_all_that_fills_the_limit():
    rollouts = made([3, 6], [0, 0])
    rollouts.versions[4:8] = ENVIRONMENT  # the second has 2 tokens of its own
    section, overlong = RewardSection(length=1.0), OverlongSection(handling="penalty", buffer_tokens=3)
    _, metrics = total_rewards(np.ones(2), rollouts, ["", ""], section, overlong, 6)
    rewards, _ = total_rewards(np.ones(2), rollouts, ["", ""], section, overlong, 6)
    # lengths 3 and 2: lambda -1/2 and 1/2; of 3 to 6 tokens the penalty takes 0 and 1
    assert rewards.tolist() == [0.5, 0.5] and metrics["reward/overlong"] == -0.5


def test_the_overlong_penalty_grows_over_the_buffer():
    # max 10, buffer 4: free up to 6, then quarters
    assert overlong_share(np.array([0, 6, 7, 9, 10]), 10, 4).tolist() == [0, 0, 0.25, 0.75, 1]


def test_the_form_is_a_pattern_that_is_searched_or_a_final_answer():
    texts = ["<think>a\nb</think> 4", "4", r"\boxed{4}"]
    pattern = RewardSection(format=1.0, format_pattern=r"(?s)<think>.*</think>")
    assert forms(texts, pattern)[0].tolist() == [1, 0, 0]
    assert forms(texts, RewardSection(format=1.0))[0].tolist() == [0, 0, 1]


CATASTROPHE = RewardSection(format=1.0, format_pattern=r"(x+x+)+y")


def test_a_pattern_that_backtracks_for_ever_is_stopped_and_counted():
    start = time.process_time()
    found, timeouts = forms(["xxy", "x" * 5000, "z"], CATASTROPHE)
    assert (found.tolist(), timeouts) == ([1, 0, 0], 1)
    assert time.process_time() - start < 10


def test_a_pattern_that_backtracks_on_most_texts_stops_the_run():
    with pytest.raises(GradingError, match=r"format_pattern .*: 2 of 2 completions tried .* 0\.5 of 3 .*repetitions"):
        forms(["x" * 5000, "x" * 4000, "x" * 4000], CATASTROPHE)
