"""Problems from any data set with a column of questions and one of answers, graded as mathematics.

The other data sets are this one with other names in it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Literal

from rlsys.config import ColumnSection, SourceSection, TaskSection
from rlsys.data import rows
from rlsys.data.dedup import kept_apart
from rlsys.data.problems import Problem
from rlsys.errors import ConfigError
from rlsys.rewards.math import answers


class DataSet:
    """`train`, `held_out` and `columns` are what a job need not say."""

    train: ClassVar[SourceSection | None] = None
    held_out: ClassVar[SourceSection | None] = None
    columns: ClassVar[ColumnSection | None] = None

    def __init__(self, section: TaskSection, seed: int) -> None:
        train, columns = section.train or self.train, section.columns or self.columns
        if train is None or columns is None:
            missing = (
                "train: {path: problems.jsonl}" if train is None else "columns: {prompt: question, answer: answer}"
            )
            raise ConfigError(
                f"task.{missing.partition(':')[0]} is required: task {section.name!r} has none of its own; such as "
                f"task: {{name: {section.name}, {missing}}}"
            )
        held_out = section.eval or self.held_out
        self._facts: dict[str, float] = {}
        problems = self._load(train, columns, "train")
        if held_out is not None:
            held_out_problems = self._load(held_out, columns, "eval")
        else:
            held_out_problems = [p for p in problems if kept_apart(p.prompt, section.eval_share)]
            problems = [p for p in problems if not kept_apart(p.prompt, section.eval_share)]
            if not (problems and held_out_problems):
                raise ConfigError(
                    f"task.eval_share: {section.eval_share} of {train.path} leaves {len(problems)} problems to train "
                    f"on and {len(held_out_problems)} to evaluate on; wanted some of each: change it, or give task.eval"
                )
        self._splits = {
            "train": _some(problems, section.train_problems, f"train {seed}"),
            "eval": _some(held_out_problems, section.eval_problems, f"eval {section.eval_seed}"),
        }

    def problems(self, split: Literal["train", "eval"]) -> Sequence[Problem]:
        """In the order of the data set; those of eval do not depend on the run's seed."""
        return self._splits[split]

    @staticmethod
    def grade(completion: str, answer: str) -> float:
        """1 if the completion's final answer is the right one by docs/grading.md, else 0."""
        return answers.grade(completion, answer)

    def facts(self) -> dict[str, float]:
        """Rows that were left out."""
        return self._facts

    def answer(self, text: str) -> str:
        """What of the answer's column the grader compares with, and people see."""
        return text

    def _load(self, source: SourceSection, columns: ColumnSection, split: str) -> list[Problem]:
        found = rows.load(source, columns, f"task.{split}")
        self._facts[f"task/{split}_unusable"] = float(found.unusable)
        return [
            Problem(asked, self.answer(answer))
            if isinstance(asked, str)
            else Problem.of_messages(asked, self.answer(answer))
            for asked, answer in zip(found.prompts, found.answers, strict=True)
        ]


def _some(problems: Sequence[Problem], most: int | None, seed: str) -> tuple[Problem, ...]:
    """At most so many, drawn by the seed, as data sets are often sorted by subject or difficulty; in their order."""
    if most is None or most >= len(problems):
        return tuple(problems)
    return tuple(problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), most)))
