"""Completions to text and to rewards: tokenizer, task and the killable graders as one stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlsys import tasks
from rlsys.config import JobConfig
from rlsys.errors import ConfigError
from rlsys.problems import ProblemSet, encode
from rlsys.rewards.pool import GraderPool
from rlsys.rollouts import LENGTH, Rollouts
from rlsys.types import Array


@dataclass(frozen=True, slots=True)
class Shown:
    """One completion as a person reads it."""

    prompt: str
    completion: str
    answer: str
    reward: float
    advantage: float | None  # reward minus the group's mean, before any normalising; None for a group of one
    tokens: int
    stop_reason: str


class Grading:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, problems: Mapping[str, ProblemSet], pool: GraderPool, run_id: str
    ) -> None:
        self.tokenizer, self.problems, self.pool, self.run_id = tokenizer, problems, pool, run_id

    @classmethod
    def start(cls, config: JobConfig, base: Path) -> Grading:
        """Load the tokenizer, make the task's problem sets and start the graders.

        Raises:
            ConfigError: the base has no tokenizer, rewards.function cannot be imported, or a prompt leaves no room for
                its completion.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path: no tokenizer in {base}: {str(error).strip().splitlines()[0]}") from error
        task = tasks.build(config.task, config.run.seed)
        problems = {split: encode(task.problems(split), tokenizer.encode) for split in ("train", "eval")}
        longest = max(int(np.diff(part.prompt_offsets).max()) for part in problems.values())
        room = config.model.max_length - max(config.rl.sampling.max_tokens, config.eval.max_tokens)
        if longest > room:
            raise ConfigError(
                f"model.max_length {config.model.max_length} leaves {room} tokens for a prompt, the longest has "
                f"{longest}; raise model.max_length, or lower rl.sampling.max_tokens and eval.max_tokens"
            )
        pool = GraderPool(config.rewards, config.rewards.function or task.grade)
        return cls(tokenizer, problems, pool, config.run.name)

    def grade(self, split: str, rollouts: Rollouts) -> tuple[Array, dict[str, float]]:
        """(R,) rewards and their facts.

        Raises:
            GradingError: more graders failed than rewards.max_failed_share allows.
        """
        grades = self.pool.grade(self._texts(rollouts), self._answers(split, rollouts))
        facts = {
            "reward/mean": float(grades.rewards.mean(dtype=np.float64)),
            "reward/std": float(grades.rewards.std(dtype=np.float64)),
        }
        return grades.rewards, facts | grades.counts()

    def show(self, split: str, rollouts: Rollouts, rewards: Array, rows: int) -> list[Shown]:
        """The first completion of each of the first groups."""
        firsts = np.unique(rollouts.group, return_index=True)[1][:rows]
        sizes = np.bincount(rollouts.group)
        means = np.bincount(rollouts.group, rewards) / sizes
        problems = self.problems[split]
        texts = self.tokenizer.batch_decode([rollouts.completion(r) for r in firsts], skip_special_tokens=True)
        return [
            Shown(
                prompt=problems.prompts[rollouts.problems[rollouts.group[r]]],
                completion=text,
                answer=problems.answers[rollouts.problems[rollouts.group[r]]],
                reward=float(rewards[r]),
                advantage=float(rewards[r] - means[rollouts.group[r]]) if sizes[rollouts.group[r]] > 1 else None,
                tokens=int(rollouts.lengths[r]),
                stop_reason="length" if rollouts.stop_reasons[r] == LENGTH else "stop",
            )
            for r, text in zip(firsts, texts, strict=True)
        ]

    def close(self) -> None:
        self.pool.close()

    def _texts(self, rollouts: Rollouts) -> list[str]:
        completions = np.split(rollouts.tokens, rollouts.offsets[1:-1])
        texts: list[str] = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return texts

    def _answers(self, split: str, rollouts: Rollouts) -> list[str]:
        answers = self.problems[split].answers
        return [answers[problem] for problem in rollouts.problems[rollouts.group]]
