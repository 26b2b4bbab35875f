"""Task on any data set with a column of questions and a column of answers, graded as mathematics.

Tasks such as `gsm8k` and `math` are subclasses with their own default sources and columns.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Literal

from rlsys.config import ColumnSection, SourceSection, TaskSection
from rlsys.data.dedup import is_held_out
from rlsys.data.problems import EVAL_SEED, Problem
from rlsys.data.rows import read_rows
from rlsys.errors import ConfigError
from rlsys.math_grading import answers


class DataSet:
    """Task `dataset`; `train`, `held_out` and `columns` are the defaults of task.train, task.eval and task.columns."""

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
                f"task.{missing.partition(':')[0]} is required: task {section.name!r} has no default for it; for "
                f"example task: {{name: {section.name}, {missing}}}"
            )
        held_out = section.eval or self.held_out
        self._facts: dict[str, float] = {}
        problems = self._load(train, columns, "train")
        if held_out is not None:
            held_out_problems = self._load(held_out, columns, "eval")
        else:
            held_out_problems = [p for p in problems if is_held_out(p.prompt, section.eval_share)]
            problems = [p for p in problems if not is_held_out(p.prompt, section.eval_share)]
            if not (problems and held_out_problems):
                raise ConfigError(
                    f"task.eval_share: {section.eval_share} of {train.path} leaves {len(problems)} training problems "
                    f"and {len(held_out_problems)} held-out problems; wanted at least 1 of each: change "
                    "task.eval_share, or set task.eval to a separate source"
                )
        self._splits = {
            "train": _subset(problems, section.train_problems, f"train {seed}"),
            "eval": _subset(held_out_problems, section.eval_problems, f"eval {EVAL_SEED}"),
        }

    def problems(self, split: Literal["train", "eval"]) -> Sequence[Problem]:
        """Return problems in the order of the data set; the eval split does not depend on the run's seed."""
        return self._splits[split]

    @staticmethod
    def grade(completion: str, answer: str) -> float:
        """Return 1 if the completion's final answer is correct by the rules of docs/grading.md, else 0."""
        return answers.grade(completion, answer)

    def facts(self) -> dict[str, float]:
        """Return the number of unusable rows of each split."""
        return self._facts

    def answer(self, text: str) -> str:
        """Return the reference answer in a cell of the answer column."""
        return text

    def _load(self, source: SourceSection, columns: ColumnSection, split: str) -> list[Problem]:
        rows = read_rows(source, columns, f"task.{split}")
        self._facts[f"task/{split}_unusable"] = float(rows.unusable)
        return [
            Problem(prompt, self.answer(answer))
            if isinstance(prompt, str)
            else Problem.of_messages(prompt, self.answer(answer))
            for prompt, answer in zip(rows.prompts, rows.answers, strict=True)
        ]


def _subset(problems: Sequence[Problem], max_problems: int | None, seed: str) -> tuple[Problem, ...]:
    """Return at most `max_problems` random problems in their original order.

    The first `max_problems` would be biased: many data sets are sorted by subject or difficulty.
    """
    if max_problems is None or max_problems >= len(problems):
        return tuple(problems)
    return tuple(problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), max_problems)))
