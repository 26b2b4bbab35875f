"""Grading stage: decodes completions, grades them in the grader pool, and computes rewards and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlsys import tasks
from rlsys.advantages import groups_without_gradient
from rlsys.config import JobConfig
from rlsys.data.problems import ProblemSet
from rlsys.errors import ConfigError
from rlsys.rewards.grader_pool import GraderPool
from rlsys.rewards.rollout_samples import (
    LearnedBatch,
    RolloutSample,
    best_and_worst,
    first_of_groups,
    rollout_samples,
    turn_texts,
)
from rlsys.rewards.total_reward import total_rewards
from rlsys.rollouts import Rollouts
from rlsys.run_state.jsonl import write_problems
from rlsys.tasks.problem_sets import problem_sets
from rlsys.tokenization.renderer import Renderer
from rlsys.tokenization.stop_conditions import embedding_rows, load_tokenizer, read_json
from rlsys.types import Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class GroupGrades:
    """Rewards of R completions, and statistics of their P groups."""

    rewards: Array  # (R,) float32
    grade: Array  # (P,) float64, mean task grade of each group
    passed: Array  # (P,) int64, number of completions with a grade of rewards.solved_at or more
    idle: Array  # (P,) bool, groups whose rewards give no advantage and so no gradient
    metrics: dict[str, float]
    failure: str  # error text of the first grade that failed; "" if none failed


class Grader:
    def __init__(
        self,
        config: JobConfig,
        tokenizer: PreTrainedTokenizerBase,
        problems: Mapping[str, ProblemSet],
        pool: GraderPool,
        metrics: Mapping[str, float],
    ) -> None:
        """`problems`: problem sets by split. `metrics`: task metrics, recorded once per run."""
        self.config, self.tokenizer, self.problems, self.pool, self.metrics = config, tokenizer, problems, pool, metrics

    @classmethod
    def start(cls, config: JobConfig, base: Path) -> Grader:
        """Load the tokenizer of the base model, build the task's problem sets and start the grader processes.

        Raises:
            ConfigError: the base model has no tokenizer, rewards.function cannot be imported, the task has no problems,
                a prompt leaves no room for a completion, or has a token id outside of the model's embedding.
        """
        tokenizer = load_tokenizer(base)
        task = tasks.build(config.task, config.run.seed)
        grade = config.rewards.function or task.grade
        GraderPool.begin_imports(config.rewards, grade)
        sets = problem_sets(task, Renderer(tokenizer, config.prompt).ids_of_each, config.prompt.max_tokens)
        problems = {"train": sets.train, "eval": sets.eval}
        _refuse_too_long(config, problems)
        _refuse_unknown_tokens(base, problems)
        pool = GraderPool(config.rewards, grade)
        return cls(config, tokenizer, problems, pool, sets.metrics)

    def grade(self, split: str, rollouts: Rollouts) -> GroupGrades:
        """Compute rewards of training completions; for held-out completions the reward is the task's grade.

        Raises:
            GradingError: more grader calls failed than rewards.max_failed_share allows.
        """
        texts = self._texts(rollouts)
        problems_R = rollouts.problems[rollouts.group].tolist()
        names = [f"{'training' if split == 'train' else 'held-out'} problem {problem}" for problem in problems_R]
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
        self, split: str, count: int, rollouts: Rollouts, rewards: Array, learned: LearnedBatch | None = None
    ) -> list[RolloutSample]:
        """Select `count` completions for display: best and worst of a training step, first ones of an evaluation.

        `learned`: None unless the learner trained on the step.
        """
        chosen = first_of_groups(rollouts, count) if split == "eval" else best_and_worst(rollouts, rewards, count)
        return rollout_samples(self.tokenizer, self.problems[split], rollouts, rewards, chosen, learned)

    def write_problems(self, run_dir: Path) -> None:
        """Write the training problems' prompts and answers to the run directory."""
        train = self.problems["train"]
        write_problems(run_dir, train.prompts, train.answers)

    def close(self) -> None:
        """Kill the grader processes."""
        self.pool.close()

    def _texts(self, rollouts: Rollouts) -> list[str]:
        """Return the text that the model wrote, without replies of the environment; turns are separated by newlines."""
        return turn_texts(self.tokenizer, rollouts)

    def _answers(self, split: str, rollouts: Rollouts) -> list[str]:
        answers = self.problems[split].answers
        return [answers[problem] for problem in rollouts.problems[rollouts.group]]


def _refuse_unknown_tokens(base: Path, problems: Mapping[str, ProblemSet]) -> None:
    """Raise ConfigError for a prompt token that the model's embedding lacks: some tokenizers have extra tokens."""
    rows = embedding_rows(read_json(base / "config.json") or {})
    for split, part in problems.items():
        wrong = np.flatnonzero(part.prompt_tokens >= rows) if rows is not None else np.empty(0, np.int64)
        if len(wrong):
            i = int(np.searchsorted(part.prompt_offsets, wrong[0], "right")) - 1
            raise ConfigError(
                f"task: problem {i} of {split}, {part.prompts[i][:80]!r}: its prompt has the token id "
                f"{part.prompt_tokens[wrong[0]]}, but the model's embedding has only {rows} rows; remove such texts "
                "from the data"
            )


def _refuse_too_long(config: JobConfig, problems: Mapping[str, ProblemSet]) -> None:
    longest = max(int(np.diff(part.prompt_offsets).max()) for part in problems.values())
    room = config.model.max_length - max(config.rl.sampling.max_tokens, config.eval.max_tokens)
    if longest > room:
        raise ConfigError(
            f"model.max_length {config.model.max_length} leaves {room} tokens for a prompt, but the longest prompt has "
            f"{longest}; raise model.max_length, or lower rl.sampling.max_tokens and eval.max_tokens, or drop longer "
            f"prompts with prompt.max_tokens={room}"
        )
