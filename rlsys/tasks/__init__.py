"""Tasks: problems and how to grade an answer to them.

To add one: a class with `problems` and `grade`, a line in `_TASKS`, and its name in `rlsys.config.TaskSection`.
`grade` runs in another process that may be killed, so it must be picklable: a static method or plain function is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

from rlsys.config import TaskSection
from rlsys.errors import ConfigError
from rlsys.problems import Problem
from rlsys.tasks.arithmetic import Arithmetic

Split = Literal["train", "eval"]


class Task(Protocol):
    """What a run needs to know: two disjoint splits of problems, and the reward of one completion."""

    def problems(self, split: Split) -> Sequence[Problem]: ...

    def grade(self, completion: str, answer: str) -> float: ...


@runtime_checkable
class TeachableTask(Task, Protocol):
    """A task that can also write examples, so that a base model can be made from nothing."""

    def supervised_examples(self, n: int, worked_share: float, seed: int) -> list[tuple[str, str]]:
        """(prompt, answer text) pairs, disjoint from all other problems; `worked_share` of them show their steps."""
        ...

    def gate_problems(self, n: int) -> Sequence[Problem]:
        """Problems to watch the supervised stage on; they are in no split and in no example."""
        ...

    def force_steps(self, problem: Problem) -> Problem:
        """The problem with a prompt that already begins the worked steps."""
        ...


_TASKS: dict[str, Callable[[TaskSection, int], Task]] = {"arithmetic": Arithmetic}


def build(section: TaskSection, seed: int) -> Task:
    """The task that `section.name` names; `seed` draws its training problems.

    Raises:
        ConfigError: no such task, or it cannot give what the section asks for.
    """
    if section.name not in _TASKS:
        raise ConfigError(f"task.name: found {section.name!r}; wanted one of {sorted(_TASKS)}")
    return _TASKS[section.name](section, seed)
