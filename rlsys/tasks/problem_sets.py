"""Problem sets of a task: both splits deduplicated against each other, tokenized, filtered by length and counted.

A training problem that is also a held-out problem is left out of training and counted, so no problem that is evaluated
is trained on. Problem ids number the remaining problems: the same job and data give the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.data.dedup import count_repeated, find_shared, format_shared
from rlsys.data.messages import why_not_messages
from rlsys.data.problems import Encode, Problem, ProblemSet, encode
from rlsys.errors import ConfigError
from rlsys.tasks import CountingTask, Split, Task


@dataclass(frozen=True, slots=True)
class ProblemSets:
    """Training and held-out problems of a run."""

    train: ProblemSet
    eval: ProblemSet
    metrics: dict[str, float]  # "task/...", counts of problems

    def of(self, split: str) -> ProblemSet:
        return self.train if split == "train" else self.eval


def problem_sets(task: Task, encode_fn: Encode, max_tokens: int | None = None) -> ProblemSets:
    """Build the problem sets of a task.

    `encode_fn` returns the prompt tokens of each question or list of messages. Prompts of more than `max_tokens` are
    dropped.

    Raises:
        ConfigError: a split has no usable problem, or all training problems are also held-out problems.
    """
    train, held_out = _problems(task, "train"), _problems(task, "eval")
    train_prompts, eval_prompts = [problem.prompt for problem in train], [problem.prompt for problem in held_out]
    shared = find_shared(train_prompts, eval_prompts)
    if train and len(shared) == len(train):
        raise ConfigError(
            f"task: all {len(train)} training problems are also held-out problems, such as "
            f"{format_shared(shared, train_prompts, eval_prompts)}; give task.train and task.eval different sources, "
            "or leave task.eval out to hold out a part of task.train"
        )
    kept = [problem for i, problem in enumerate(train) if i not in shared]
    sets = {"train": encode(kept, encode_fn, max_tokens), "eval": encode(held_out, encode_fn, max_tokens)}
    metrics = dict(task.facts()) if isinstance(task, CountingTask) else {}
    for split, problems in sets.items():
        metrics[f"task/{split}_problems"] = float(len(problems))
        metrics[f"task/{split}_dropped"] = float(problems.dropped)
    metrics["task/train_held_out"] = float(len(shared))
    metrics["task/train_repeated"] = float(count_repeated(sets["train"].prompts))
    return ProblemSets(sets["train"], sets["eval"], metrics)


def _problems(task: Task, split: Split) -> Sequence[Problem]:
    """Return the problems of a split after checking their types: the task may be user code."""
    problems = task.problems(split)
    for i, problem in enumerate(problems):
        if (
            not isinstance(problem, Problem)
            or not isinstance(problem.prompt, str)
            or not isinstance(problem.answer, str)
        ):
            raise ConfigError(
                f"task: problem {i} of {split} is {str(problem)[:120]!r}; wanted "
                "rlsys.data.problems.Problem(prompt, answer), both strings"
            )
        why = _why_unusable(problem)
        if why:
            raise ConfigError(f"task: problem {i} of {split}, {problem.prompt[:80]!r}: {why}")
    return problems


def _why_unusable(problem: Problem) -> str:
    pairs = isinstance(problem.messages, tuple) and all(
        isinstance(message, tuple) and len(message) == 2 and all(isinstance(text, str) for text in message)
        for message in problem.messages
    )
    if not pairs:
        return f"its messages are {str(problem.messages)[:120]!r}; wanted a tuple of (role, content) pairs of strings"
    for text in (problem.prompt, problem.answer, *(content for _, content in problem.messages)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return (
                f"a text has an unpaired surrogate ({text[error.start]!a}) at character {error.start}; wanted text "
                "that can be encoded as UTF-8"
            )
    return f"it {why_not_messages(problem.messages)}" if problem.messages and why_not_messages(problem.messages) else ""
