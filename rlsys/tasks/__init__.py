"""Tasks: problems, and the function that grades a completion.

A task is a class `Class(section: TaskSection, seed: int)` with the methods `problems` and `grade`. A job selects a
user-defined task by import path, "package.module:Class". To add a built-in task, add a module to this package and a
line to `_TASKS`. `grade` and `reply` run in other processes, which may be killed. They must therefore be picklable, as
static methods and plain functions are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from rlsys.data.problems import Problem
from rlsys.errors import ConfigError, did_you_mean
from rlsys.utils.import_path import import_by_path

if TYPE_CHECKING:  # grader processes import this module, and no configuration
    from rlsys.config import TaskSection

Split = Literal["train", "eval"]


@runtime_checkable
class Task(Protocol):
    """Interface that every task implements."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of a split."""
        ...

    def grade(self, completion: str, answer: str) -> float:
        """Return the grade of a completion against the reference answer: any finite number."""
        ...


@runtime_checkable
class ConversationTask(Task, Protocol):
    """Multi-turn task: an environment replies to the model.

    An optional attribute `stop` holds the texts that end a turn of the model.
    """

    def reply(self, turns: Sequence[str], answer: str) -> str | None:
        """Return the reply to the model's turns so far, oldest first; None ends the conversation."""
        ...


@runtime_checkable
class CountingTask(Task, Protocol):
    """Task that reports metrics about its data source."""

    def facts(self) -> Mapping[str, float]:
        """Return metrics named "task/...", which are recorded once per run."""
        ...


@runtime_checkable
class TeachableTask(Task, Protocol):
    """Task that also generates supervised examples, from which a base model is trained from scratch."""

    def supervised_examples(self, n: int, worked_share: float, seed: int) -> Sequence[tuple[str, ...]]:
        """Return `n` examples (prompt, answer text), disjoint from the problems of every split.

        A share `worked_share` of the examples shows the worked steps. Examples of a ConversationTask may also be
        (prompt, turn, reply, turn, ...); the loss leaves the replies out.
        """
        ...

    def gate_problems(self, n: int) -> Sequence[Problem]:
        """Return `n` problems that measure the supervised stage; they are in no split and in no example."""
        ...

    def force_steps(self, problem: Problem) -> Problem:
        """Return the problem with a prompt that already starts the worked steps."""
        ...


# Import paths instead of classes: a job imports only the module of its own task.
_TASKS = {
    "arithmetic": "rlsys.tasks.arithmetic:Arithmetic",
    "calculator": "rlsys.tasks.calculator:Calculator",
    "dataset": "rlsys.tasks.dataset:DataSet",
    "deepscaler": "rlsys.tasks.deepscaler:DeepScaleR",
    "gsm8k": "rlsys.tasks.gsm8k:Gsm8k",
    "math": "rlsys.tasks.math:Math",
    "python": "rlsys.tasks.python_tool:PythonTool",
}
_WANTED = f"one of {', '.join(_TASKS)}, or the import path of your own task, 'package.module:Class'"


def build(section: TaskSection, seed: int) -> Task:
    """Build the task `section.name`; `seed` selects its training problems.

    Raises:
        ConfigError: the task does not exist, lacks a method, or cannot satisfy the section.
    """
    make = _class_of(section)
    try:
        inspect.signature(make).bind(section, seed)
    except TypeError as error:
        raise ConfigError(
            f"task.name: {section.name!r} cannot be constructed as {make.__name__}(section, seed): {error}"
        ) from None
    task = make(section, seed)
    if not isinstance(task, Task):
        missing = [name for name in ("problems", "grade") if not callable(getattr(task, name, None))]
        raise ConfigError(
            f"task.name: {section.name!r} has no method {' and no method '.join(missing)}; see docs/extending.md"
        )
    return task


def converses(section: TaskSection) -> bool:
    """Return whether the task is multi-turn, without building its problems.

    Raises:
        ConfigError: the task does not exist.
    """
    return callable(getattr(_class_of(section), "reply", None))


def _class_of(section: TaskSection) -> type:
    if section.name not in _TASKS and ":" not in section.name:
        raise ConfigError(f"task.name: found {section.name!r}; wanted {_WANTED}{did_you_mean(section.name, _TASKS)}")
    task_class = import_by_path(_TASKS.get(section.name, section.name), "task.name", _WANTED)
    if not isinstance(task_class, type):
        raise ConfigError(f"task.name: {section.name!r} is a {type(task_class).__name__}; wanted a class")
    return task_class
