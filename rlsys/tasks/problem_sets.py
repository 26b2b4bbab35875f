"""A task's two splits as a run meets them: checked against each other, rendered, filtered by length, counted.

What is evaluated is never trained on: a training problem that is held out too is left out of training, and counted. Ids
count what is left, so the same job and data give the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.data.dedup import example, repeated, shared
from rlsys.data.messages import why_not_messages
from rlsys.data.problems import Problem, ProblemSet, encode
from rlsys.errors import ConfigError
from rlsys.tasks import CountingTask, Split, Task


@dataclass(frozen=True, slots=True)
class ProblemSets:
    """What a run trains on and what it evaluates on."""

    train: ProblemSet
    eval: ProblemSet
    metrics: dict[str, float]  # "task/...", numbers of problems

    def of(self, split: str) -> ProblemSet:
        return self.train if split == "train" else self.eval


def problem_sets(task: Task, encode_fn: Callable[[Any], Sequence[int]], max_tokens: int | None = None) -> ProblemSets:
    """Of a task; `encode_fn` makes a question or messages the tokens of a prompt.

    Prompts longer than `max_tokens` are dropped.

    Raises:
        ConfigError: a split has no problem that is usable, or all training problems are held out.
    """
    train, held_out = _problems(task, "train"), _problems(task, "eval")
    trained, asked = [problem.prompt for problem in train], [problem.prompt for problem in held_out]
    both = shared(trained, asked)
    if train and len(both) == len(train):
        raise ConfigError(
            f"task: all {len(train)} training problems are held out too, such as {example(both, trained, asked)}; give "
            "task.train and task.eval different sources, or leave task.eval out to keep a part of train apart"
        )
    left = [problem for place, problem in enumerate(train) if place not in both]
    sets = {"train": encode(left, encode_fn, max_tokens), "eval": encode(held_out, encode_fn, max_tokens)}
    metrics = dict(task.facts()) if isinstance(task, CountingTask) else {}
    for split, problems in sets.items():
        metrics[f"task/{split}_problems"] = float(len(problems))
        metrics[f"task/{split}_dropped"] = float(problems.dropped)
    metrics["task/train_held_out"] = float(len(both))
    metrics["task/train_repeated"] = float(repeated(sets["train"].prompts))
    return ProblemSets(sets["train"], sets["eval"], metrics)


def _problems(task: Task, split: Split) -> Sequence[Problem]:
    """Of a task that may be the user's own."""
    found = task.problems(split)
    for place, problem in enumerate(found):
        if (
            not isinstance(problem, Problem)
            or not isinstance(problem.prompt, str)
            or not isinstance(problem.answer, str)
        ):
            raise ConfigError(
                f"task: problem {place} of {split} is {str(problem)[:120]!r}; wanted "
                "rlsys.data.problems.Problem(prompt, answer), both of them texts"
            )
        why = _why_unusable(problem)
        if why:
            raise ConfigError(f"task: problem {place} of {split}, {problem.prompt[:80]!r}: {why}")
    return found


def _why_unusable(problem: Problem) -> str:
    pairs = isinstance(problem.messages, tuple) and all(
        isinstance(message, tuple) and len(message) == 2 and all(isinstance(text, str) for text in message)
        for message in problem.messages
    )
    if not pairs:
        return (
            f"its messages are {str(problem.messages)[:120]!r}; wanted a tuple of (role, content), both of them texts"
        )
    for text in (problem.prompt, problem.answer, *(content for _, content in problem.messages)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"a text has half a character ({text[error.start]!a}) at {error.start}; wanted a whole one"
    return f"it {why_not_messages(problem.messages)}" if problem.messages and why_not_messages(problem.messages) else ""
