"""Tasks: problems and how to grade an answer to them.

A task is a class `Class(section: TaskSection, seed: int)` with `problems` and `grade`. One of the user's own is named
by path, "package.module:Class"; to add one here: a module beside this one, and a line in `_TASKS`. `grade` and `reply`
run in other processes that may be killed, so they must be picklable: a static method or plain function is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from rlsys.config import TaskSection
from rlsys.data.problems import Problem
from rlsys.errors import ConfigError, did_you_mean
from rlsys.utils.import_path import import_by_path

Split = Literal["train", "eval"]


@runtime_checkable
class Task(Protocol):
    """What a run needs to know: two splits of problems, and how right one completion is: any finite number."""

    def problems(self, split: Split) -> Sequence[Problem]: ...

    def grade(self, completion: str, answer: str) -> float: ...


@runtime_checkable
class ConversationTask(Task, Protocol):
    """A task whose environment answers the model. `stop`, where it has one: texts that end a turn of the model."""

    def reply(self, turns: Sequence[str], answer: str) -> str | None:
        """To the model's turns so far, the last one last; None: the conversation is over."""
        ...


@runtime_checkable
class CountingTask(Task, Protocol):
    """A task that has something to say about where its problems come from."""

    def facts(self) -> Mapping[str, float]:
        """Metrics, each "task/...", once per run."""
        ...


@runtime_checkable
class TeachableTask(Task, Protocol):
    """A task that can also write examples, so that a base model can be made from nothing."""

    def supervised_examples(self, n: int, worked_share: float, seed: int) -> Sequence[tuple[str, ...]]:
        """(prompt, answer text), disjoint from all other problems; `worked_share` of them show their steps.

        Of a ConversationTask also (prompt, turn, reply, turn, ...): replies are read and not learned.
        """
        ...

    def gate_problems(self, n: int) -> Sequence[Problem]:
        """Problems to watch the supervised stage on; they are in no split and in no example."""
        ...

    def force_steps(self, problem: Problem) -> Problem:
        """The problem with a prompt that already begins the worked steps."""
        ...


# Paths, because a task's imports are only paid for by the job that names it.
_TASKS = {
    "arithmetic": "rlsys.tasks.arithmetic:Arithmetic",
    "calculator": "rlsys.tasks.calculator:Calculator",
    "dataset": "rlsys.tasks.dataset:DataSet",
    "deepscaler": "rlsys.tasks.deepscaler:DeepScaleR",
    "gsm8k": "rlsys.tasks.gsm8k:Gsm8k",
    "math": "rlsys.tasks.math:Math",
    "python": "rlsys.tasks.python_tool:PythonTool",
}
_WANTED = f"one of {', '.join(_TASKS)}, or one of your own as 'package.module:Class'"


def build(section: TaskSection, seed: int) -> Task:
    """The task that `section.name` names; `seed` draws its training problems.

    Raises:
        ConfigError: no such task, or it cannot give what the section asks for.
    """
    make = _class_of(section)
    try:
        inspect.signature(make).bind(section, seed)
    except TypeError as error:
        raise ConfigError(
            f"task.name: {section.name!r} cannot be made as {make.__name__}(section, seed): {error}"
        ) from None
    task = make(section, seed)
    if not isinstance(task, Task):
        missing = [name for name in ("problems", "grade") if not callable(getattr(task, name, None))]
        raise ConfigError(
            f"task.name: {section.name!r} has no method {' and no method '.join(missing)}; see docs/extending.md"
        )
    return task


def converses(section: TaskSection) -> bool:
    """Whether the environment of the task answers the model; its problems are not made for that.

    Raises:
        ConfigError: no such task.
    """
    return callable(getattr(_class_of(section), "reply", None))


def _class_of(section: TaskSection) -> type:
    if section.name not in _TASKS and ":" not in section.name:
        raise ConfigError(f"task.name: found {section.name!r}; wanted {_WANTED}{did_you_mean(section.name, _TASKS)}")
    found = import_by_path(_TASKS.get(section.name, section.name), "task.name", _WANTED)
    if not isinstance(found, type):
        raise ConfigError(f"task.name: {section.name!r} is a {type(found).__name__}; wanted a class")
    return found
