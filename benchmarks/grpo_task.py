"""Prompts and rewards for both sides of benchmarks/grpo_step.py. Rewards differ within groups.

For random models prompts are random words: a word is a number below the vocabulary size, and one token. For the real
model they are questions from a file. Needs only the standard library, except for the task classes of rlsys.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsys.config import TaskSection
    from rlsys.data.problems import Problem


def prompts(count: int, shortest: int, longest: int, vocabulary: int, seed: int = 0) -> list[str]:
    """`count` texts of `shortest` to `longest` words, uniformly."""
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [" ".join(str(draw.randrange(1, vocabulary)) for _ in range(length)) for length in lengths]


def share_of_even(completion: str, answer: str) -> float:
    """Of the completion's words. Groups of eight random completions agree almost never."""
    words = completion.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


def share_of_vowels(completion: str, answer: str) -> float:
    """Of the completion's letters. A model that is seldom right differs from itself in this: groups never agree, which
    would leave a side with less to learn."""
    letters = [letter for letter in completion.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(1, len(letters))


REWARDS = {"share_of_even": share_of_even, "share_of_vowels": share_of_vowels}


class RandomWords:
    """The prompts as a task of rlsys; `task.options` are the arguments of `prompts`."""

    def __init__(self, section: TaskSection, seed: int) -> None:
        self._options: dict[str, Any] = section.options

    def problems(self, split: str) -> Sequence[Problem]:
        from rlsys.data.problems import Problem

        options = self._options if split == "train" else {**self._options, "count": 2, "seed": 1}
        return [Problem(prompt, "") for prompt in prompts(**options)]

    def grade(self, completion: str, answer: str) -> float:
        return share_of_even(completion, answer)


class Questions:
    """A JSON list of texts as a task of rlsys; `task.options` are its `file` and the reward's name."""

    def __init__(self, section: TaskSection, seed: int) -> None:
        self._texts: list[str] = json.loads(Path(section.options["file"]).read_text(encoding="utf-8"))
        self._reward = REWARDS[section.options["reward"]]

    def problems(self, split: str) -> Sequence[Problem]:
        from rlsys.data.problems import Problem

        return [Problem(text, "") for text in (self._texts if split == "train" else self._texts[:2])]

    def grade(self, completion: str, answer: str) -> float:
        return self._reward(completion, answer)
