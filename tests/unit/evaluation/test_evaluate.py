"""What is asked of samplers and graders for an evaluation, and what becomes of their answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from rlsys.config import JobConfig, parse_config
from rlsys.evaluation.evaluate import evaluate_policy
from rlsys.protocols import Ref, RewardsRef, RolloutsRef
from rlsys.types import Array, SamplingParams


@dataclass
class Policy:
    """A policy that solves the even problems greedily, and `p` of the completions that are drawn."""

    asked: list[tuple[str, int, SamplingParams]] = field(default_factory=list)
    tickets: list[RolloutsRef] = field(default_factory=list)

    def submit(self, split: str, problems: Array, n: int, params: SamplingParams, *, urgent: bool) -> int:
        assert urgent, "groups that no sampler has begun would come first"
        self.asked.append((split, n, params))
        metrics = {"sampler/completion_tokens_mean": 5.0 * n, "sampler/truncated_share": 0.25 * n}
        self.tickets.append(RolloutsRef((Ref((problems, n, params)),), metrics))
        return len(self.tickets) - 1

    def wait(self, ticket: int) -> RolloutsRef:
        return self.tickets[ticket]

    def grade(self, split: str, rollouts: RolloutsRef) -> RewardsRef:
        problems, n, params = rollouts.refs[0].value
        if params.temperature == 0:
            right = (problems % 2 == 0).astype(np.int64)
        else:
            right = np.random.default_rng(params.seed).binomial(n, 0.5, len(problems))
        return RewardsRef((), {}, right / n, right, np.zeros(len(problems), bool))


def job(*overrides: str) -> JobConfig:
    text = "{run: {name: toy}, model: {path: x}, rl: {sampling: {stop: [END]}}, eval: {max_tokens: 9}}"
    return parse_config(text, overrides)


def test_greedy_completions_are_of_one_each_and_stop_where_training_stops() -> None:
    policy = Policy()
    found = evaluate_policy(job(), policy, policy, np.arange(10))
    assert policy.asked == [("eval", 1, SamplingParams(max_tokens=9, temperature=0.0, stop=["END"]))]
    assert found.metrics["eval/accuracy"] == 0.5 and found.passed is None
    assert (found.metrics["eval/mean_tokens"], found.metrics["eval/truncated_share"]) == (5.0, 0.25)
    assert found.metrics["eval/problems"] == 10 and found.metrics["time/eval_s"] > 0


def test_pass_at_k_is_from_the_sampled_completions_and_accuracy_is_not() -> None:
    policy = Policy()
    found = evaluate_policy(
        job("eval.samples=6", "eval.pass_k=[1,3]", "eval.temperature=0.7"), policy, policy, np.arange(200)
    )
    assert [(n, params.temperature, params.seed) for _, n, params in policy.asked] == [(1, 0.0, None), (6, 0.7, 99)]
    assert found.metrics["eval/accuracy"] == 0.5 and found.metrics["eval/mean_tokens"] == 5.0
    assert found.metrics["eval/pass_at_1"] == pytest.approx(0.5, abs=0.05)
    assert found.metrics["eval/pass_at_3"] == pytest.approx(1 - 0.5**3, abs=0.05)
    assert found.passed is not None and found.passed.shape == (200,)


def test_what_is_solved_is_the_jobs_to_say() -> None:
    class Costs(Policy):
        def grade(self, split: str, rollouts: RolloutsRef) -> RewardsRef:
            problems = rollouts.refs[0].value[0]
            none = np.zeros(len(problems), np.int64)
            return RewardsRef((), {}, -problems.astype(np.float64), none, none.astype(bool))

    found = evaluate_policy(job("rewards.solved_at=-2"), policy := Costs(), policy, np.arange(10))
    assert found.metrics["eval/accuracy"] == -4.5 and found.metrics["eval/solved"] == 0.3
    assert found.metrics["eval/accuracy_low"] < -4.5 < found.metrics["eval/accuracy_high"] < 0


def test_two_evaluations_ask_for_the_same_draws_whatever_the_seed_of_the_run() -> None:
    one, other = Policy(), Policy()
    evaluate_policy(job("eval.samples=2"), one, one, np.arange(4))
    evaluate_policy(job("eval.samples=2", "run.seed=8"), other, other, np.arange(4))
    assert one.asked == other.asked
