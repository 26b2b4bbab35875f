"""Evaluates a policy on held-out problems with samplers and graders, during a run and for `rlsys eval`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rlsys.config import JobConfig
from rlsys.data.problems import EVAL_SEED
from rlsys.evaluation.statistics import CONFIDENCE, Evaluation, evaluation_of
from rlsys.metrics import Metrics
from rlsys.protocols import Graders, RewardsRef, RolloutsRef
from rlsys.types import Array, SamplingParams


class Sampling(Protocol):
    """Methods of ``Samplers`` that an evaluation uses."""

    def submit(self, split: str, problems: Array, n: int, params: SamplingParams, *, urgent: bool) -> int: ...

    def wait(self, ticket: int) -> RolloutsRef: ...


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Result of an evaluation on P problems."""

    evaluation: Evaluation
    metrics: Metrics
    rollouts: RolloutsRef  # greedy completions, one per problem
    grades: RewardsRef  # of the greedy completions
    passed: Array | None  # (P,) int64, correct ones among eval.samples sampled completions; None: none were sampled


def evaluate_policy(
    config: JobConfig,
    samplers: Sampling,
    graders: Graders,
    held_out: Array,
    meanwhile: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Evaluate the policy version that the samplers have loaded, on the ids `held_out`. `meanwhile`: called once the
    samplers have the problems.

    The seed is the same at every step, so that results of two versions differ only because of the policy.

    Raises:
        RolledBack: a stage lost state and has recovered; nothing has changed, and the evaluation can be repeated.
    """
    start, section, stop = time.perf_counter(), config.eval, config.rl.sampling.stop or None
    greedy = SamplingParams(section.max_tokens, temperature=0.0, stop=stop)
    ticket = samplers.submit("eval", held_out, 1, greedy, urgent=True)
    meanwhile()
    rollouts = samplers.wait(ticket)
    grades = graders.grade("eval", rollouts)
    passed = None
    if section.samples:
        params = SamplingParams(section.max_tokens, section.temperature, seed=EVAL_SEED, stop=stop)
        ticket = samplers.submit("eval", held_out, section.samples, params, urgent=True)
        passed = graders.grade("eval", samplers.wait(ticket)).passed
    evaluation = evaluation_of(
        grades.grade, passed, section.samples, section.pass_k, CONFIDENCE, config.rewards.solved_at
    )
    metrics = {
        **evaluation.metrics(),
        "eval/mean_tokens": rollouts.metrics["sampler/completion_tokens_mean"],
        "eval/truncated_share": rollouts.metrics["sampler/truncated_share"],
        "time/eval_s": time.perf_counter() - start,
    }
    return EvalResult(evaluation, metrics, rollouts, grades, passed)
