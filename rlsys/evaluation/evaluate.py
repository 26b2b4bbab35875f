"""Held-out problems through samplers and graders: the one way to evaluate a policy, within a run and alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from rlsys.config import JobConfig
from rlsys.evaluation.statistics import Evaluation, evaluation_of
from rlsys.metrics import Metrics
from rlsys.protocols import Graders, RewardsRef, RolloutsRef
from rlsys.types import Array, SamplingParams


class Sampling(Protocol):
    """Of ``Samplers``, what is needed here."""

    def sample(self, split: str, problems: Array, n: int, params: SamplingParams) -> RolloutsRef: ...


@dataclass(frozen=True, slots=True)
class EvalResult:
    evaluation: Evaluation
    metrics: Metrics
    rollouts: RolloutsRef  # greedy, one of each problem
    grades: RewardsRef  # of those
    passed: Array | None  # (P,) int64, right ones among the eval.samples sampled completions; None: none were sampled


def evaluate_policy(config: JobConfig, samplers: Sampling, graders: Graders, held_out: Array) -> EvalResult:
    """Under the version that is loaded. The same seed at every step, so that two versions differ by what they learned.

    Raises:
        RolledBack: something was lost; nothing has changed, so the call can be repeated.
    """
    began, section, stop = time.perf_counter(), config.eval, config.rl.sampling.stop or None
    greedy = SamplingParams(section.max_tokens, temperature=0.0, stop=stop)
    rollouts = samplers.sample("eval", held_out, 1, greedy)
    grades = graders.grade("eval", rollouts)
    passed = None
    if section.samples:
        params = SamplingParams(section.max_tokens, section.temperature, seed=config.task.eval_seed, stop=stop)
        sampled = samplers.sample("eval", held_out, section.samples, params)
        passed = graders.grade("eval", sampled).passed
    found = evaluation_of(
        grades.grade, passed, section.samples, section.pass_k, section.confidence, config.rewards.solved_at
    )
    metrics = {
        **found.metrics(),
        "eval/mean_tokens": rollouts.metrics["sampler/completion_tokens_mean"],
        "eval/truncated_share": rollouts.metrics["sampler/truncated_share"],
        "time/eval_s": time.perf_counter() - began,
    }
    return EvalResult(found, metrics, rollouts, grades, passed)
