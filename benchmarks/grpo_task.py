"""What both sides of benchmarks/grpo_step.py work on: prompts of random words, and a reward that differs within groups.

A word is a number below the vocabulary, and a token. Standard library only, but for the task as rlsys takes it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsys.config import TaskSection
    from rlsys.problems import Problem


def prompts(count: int, shortest: int, longest: int, vocabulary: int, seed: int = 0) -> list[str]:
    """`count` texts of `shortest` to `longest` words, uniformly."""
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [" ".join(str(draw.randrange(1, vocabulary)) for _ in range(length)) for length in lengths]


def share_of_even(completion: str, answer: str) -> float:
    """Of the completion's words. Groups of eight random completions agree almost never."""
    words = completion.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


class RandomWords:
    """The prompts as a task of rlsys; `task.options` are the arguments of `prompts`."""

    def __init__(self, section: TaskSection, seed: int) -> None:
        self._options: dict[str, Any] = section.options

    def problems(self, split: str) -> Sequence[Problem]:
        from rlsys.problems import Problem

        options = self._options if split == "train" else {**self._options, "count": 2, "seed": 1}
        return [Problem(prompt, "") for prompt in prompts(**options)]

    def grade(self, completion: str, answer: str) -> float:
        return share_of_even(completion, answer)
