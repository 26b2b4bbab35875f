"""Completions to text and to rewards: tokenizer, task and the killable graders as one stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlsys import tasks
from rlsys.advantages import groups_without_gradient
from rlsys.config import JobConfig
from rlsys.data.problems import ProblemSet
from rlsys.errors import ConfigError
from rlsys.grading.samples import (
    LearnedBatch,
    RolloutSample,
    best_and_worst,
    first_of_groups,
    rollout_samples,
    turn_texts,
)
from rlsys.rewards.grader_pool import GraderPool
from rlsys.rewards.terms import total_rewards
from rlsys.rollouts import Rollouts
from rlsys.run_state.jsonl import write_problems
from rlsys.tasks.problem_sets import problem_sets
from rlsys.tokenization.renderer import Renderer
from rlsys.tokenization.stop_conditions import load_tokenizer, read_json, rows_of
from rlsys.types import Array


@dataclass(frozen=True, slots=True)
class GroupGrades:
    """R rewards and their P groups; ``facts`` are figures of the step."""

    rewards: Array  # (R,) float32
    grade: Array  # (P,) float64, mean grade of the task
    passed: Array  # (P,) int64, completions whose grade is rewards.solved_at or more
    idle: Array  # (P,) bool, whose rewards give no advantage
    metrics: dict[str, float]
    failure: str  # of the first grade that failed; "" without one


class Grader:
    def __init__(
        self,
        config: JobConfig,
        tokenizer: PreTrainedTokenizerBase,
        problems: Mapping[str, ProblemSet],
        pool: GraderPool,
        metrics: Mapping[str, float],
    ) -> None:
        """`facts`: of the task, once per run."""
        self.config, self.tokenizer, self.problems, self.pool, self.metrics = config, tokenizer, problems, pool, metrics

    @classmethod
    def start(cls, config: JobConfig, base: Path) -> Grader:
        """Load the tokenizer, make the task's problem sets and start the graders.

        Raises:
            ConfigError: the base has no tokenizer, rewards.function cannot be imported, the task has no problems, or a
                prompt leaves no room for its completion.
        """
        tokenizer = load_tokenizer(base)
        task = tasks.build(config.task, config.run.seed)
        sets = problem_sets(task, Renderer(tokenizer, config.prompt).ids, config.prompt.max_tokens)
        problems = {"train": sets.train, "eval": sets.eval}
        _refuse_too_long(config, problems)
        _refuse_beyond(base, problems)
        pool = GraderPool(config.rewards, config.rewards.function or task.grade)
        return cls(config, tokenizer, problems, pool, sets.metrics)

    def grade(self, split: str, rollouts: Rollouts) -> GroupGrades:
        """Rewards of training completions; of held-out ones the task's grade alone.

        Raises:
            GradingError: more graders failed than rewards.max_failed_share allows.
        """
        texts = self._texts(rollouts)
        of_R = rollouts.problems[rollouts.group].tolist()
        names = [f"{'training' if split == 'train' else 'held-out'} problem {problem}" for problem in of_R]
        grades = self.pool.grade(texts, self._answers(split, rollouts), names)
        rewards, metrics = grades.rewards, {"reward/mean": float(grades.rewards.mean(dtype=np.float64))}
        if split == "train":
            rl = self.config.rl
            rewards, metrics = total_rewards(
                grades.rewards, rollouts, texts, self.config.rewards, rl.overlong, rl.sampling.max_tokens
            )
        P = len(rollouts.problems)
        count_P = np.bincount(rollouts.group, minlength=P)
        metrics = {**metrics, **grades.counts(), "reward/completions": float(len(texts))}
        return GroupGrades(
            rewards=rewards,
            grade=np.bincount(rollouts.group, grades.rewards, minlength=P) / count_P,
            passed=np.bincount(rollouts.group, grades.rewards >= self.config.rewards.solved_at, minlength=P).astype(
                np.int64
            ),
            idle=groups_without_gradient(rewards, rollouts.group, P, self.config.rl.advantages),
            metrics=metrics,
            failure=grades.first_error,
        )

    def show(
        self, split: str, count: int, rollouts: Rollouts, rewards: Array, *learned: Sequence[Any]
    ) -> list[RolloutSample]:
        """The best and the worst completions of a step; of held-out problems the first."""
        seen = LearnedBatch(*learned) if learned and learned[0] else None
        chosen = first_of_groups(rollouts, count) if split == "eval" else best_and_worst(rollouts, rewards, count)
        return rollout_samples(self.tokenizer, self.problems[split], rollouts, rewards, chosen, seen)

    def write_problems(self, run_dir: Path) -> None:
        train = self.problems["train"]
        write_problems(run_dir, train.prompts, train.answers)

    def close(self) -> None:
        self.pool.close()

    def _texts(self, rollouts: Rollouts) -> list[str]:
        """What the model wrote, replies of an environment left out: turns on lines of their own."""
        return turn_texts(self.tokenizer, rollouts)

    def _answers(self, split: str, rollouts: Rollouts) -> list[str]:
        answers = self.problems[split].answers
        return [answers[problem] for problem in rollouts.problems[rollouts.group]]


def _refuse_beyond(base: Path, problems: Mapping[str, ProblemSet]) -> None:
    """Of a tokenizer with tokens that the model has not."""
    rows = rows_of(read_json(base / "config.json") or {})
    for split, part in problems.items():
        wrong = np.flatnonzero(part.prompt_tokens >= rows) if rows is not None else np.empty(0, np.int64)
        if len(wrong):
            at = int(np.searchsorted(part.prompt_offsets, wrong[0], "right")) - 1
            raise ConfigError(
                f"task: problem {at} of {split}, {part.prompts[at][:80]!r}: its prompt has the token id "
                f"{part.prompt_tokens[wrong[0]]}, the model's embedding {rows} rows; leave such texts out of the data"
            )


def _refuse_too_long(config: JobConfig, problems: Mapping[str, ProblemSet]) -> None:
    longest = max(int(np.diff(part.prompt_offsets).max()) for part in problems.values())
    room = config.model.max_length - max(config.rl.sampling.max_tokens, config.eval.max_tokens)
    if longest > room:
        raise ConfigError(
            f"model.max_length {config.model.max_length} leaves {room} tokens for a prompt, the longest has "
            f"{longest}; raise model.max_length, or lower rl.sampling.max_tokens and eval.max_tokens, or leave longer "
            f"prompts out with prompt.max_tokens={room}"
        )
