"""Held-out problems through samplers and graders: the one way to evaluate a policy, within a run and alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from rlsys.config import JobConfig
from rlsys.evaluation import Evaluation, evaluation_of
from rlsys.facts import Facts
from rlsys.stages import Graded, Graders, Made
from rlsys.types import Array, SamplingParams


class Sampling(Protocol):
    """Of ``Samplers``, what is needed here."""

    def sample(self, split: str, problems: Array, n: int, params: SamplingParams) -> Made: ...


@dataclass(frozen=True, slots=True)
class Measured:
    evaluation: Evaluation
    facts: Facts
    rollouts: Made  # greedy, one of each problem
    grades: Graded  # of those
    passed: Array | None  # (P,) int64, right ones among the eval.samples sampled completions; None: none were sampled


def measure(config: JobConfig, samplers: Sampling, graders: Graders, held_out: Array) -> Measured:
    """Under the version that is loaded. The same seed at every step, so that two versions differ by what they learned.

    Raises:
        Rewound: something was lost; nothing has changed, and it can be done again.
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
    facts = {
        **found.facts(),
        "eval/mean_tokens": rollouts.facts["sampler/completion_tokens_mean"],
        "eval/truncated_share": rollouts.facts["sampler/truncated_share"],
        "time/eval_s": time.perf_counter() - began,
    }
    return Measured(found, facts, rollouts, grades, passed)
