"""Generated word problems with addition and subtraction.

    Tom has 12 books, buys 4 more, loses 7, gives away 3. How many books does Tom have?
    12+4=16             worked answer
    16-7=9
    9-3=6
    \\boxed{6}          direct answer: only this line

A hash of the prompt assigns each problem to one of four parts (eval, gate, train, supervised). The parts are therefore
disjoint for every seed and size, also across runs and after a resume.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlsys.data.problems import EVAL_SEED, Problem, distinct
from rlsys.errors import ConfigError
from rlsys.math_grading.extraction import extract, plain_number

if TYPE_CHECKING:  # grader processes import this module, and no configuration
    from rlsys.config import TaskSection

NAMES = ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia")
ITEMS = ("books", "apples", "coins", "pens")
GAINS = ("buys {} more", "finds {} more")
LOSSES = ("loses {}", "gives away {}")
MAX_OPERAND, MAX_VALUE = 9, 20
TRAIN_PROBLEMS, EVAL_PROBLEMS = 4096, 200  # defaults of task.train_problems and task.eval_problems

Part = Literal["eval", "gate", "train", "supervised"]
# Tenths of all prompts. The supervised part is the largest because it needs the most problems; eval and gate need few.
_PARTS: tuple[Part, ...] = ("eval", "gate", "train", "train", "train") + ("supervised",) * 5


# By value: changes that keep it in range.
_CHANGES = tuple(
    [change for change in range(-MAX_OPERAND, MAX_OPERAND + 1) if change != 0 and 0 <= value + change <= MAX_VALUE]
    for value in range(MAX_VALUE + 1)
)


class _Story(NamedTuple):
    prompt: str
    values: list[int]  # at the start and after each operation

    @property
    def steps(self) -> str:
        """One line per operation."""
        pairs = itertools.pairwise(self.values)
        return "".join(f"{before}{after - before:+d}={after}\n" for before, after in pairs)

    @property
    def answer(self) -> int:
        return self.values[-1]


class Arithmetic:
    """Task `arithmetic`: starting values in 1..20, operands in 1..9, intermediate results in 0..20."""

    def __init__(self, section: TaskSection, seed: int) -> None:
        if section.min_operations > section.max_operations:
            raise ConfigError(
                f"task.min_operations: found {section.min_operations}; wanted at most task.max_operations = "
                f"{section.max_operations}"
            )
        self._section = section
        self._splits = {
            "train": self._distinct("train", section.train_problems or TRAIN_PROBLEMS, seed, "train_problems"),
            "eval": self._distinct("eval", section.eval_problems or EVAL_PROBLEMS, EVAL_SEED, "eval_problems"),
        }

    def problems(self, split: Literal["train", "eval"]) -> Sequence[Problem]:
        """Return distinct problems; the eval split does not depend on the run's seed."""
        return self._splits[split]

    @staticmethod
    def grade(completion: str, answer: str) -> float:
        """Return 1 if the last box or #### line contains the answer as a number, else 0.

        An expression of equal value gets 0: `\\boxed{12+4-7-3}` would earn the reward without the calculation.
        """
        final_answer = extract(completion)
        number = None if final_answer is None else plain_number(final_answer)
        return float(number is not None and number == plain_number(answer))

    def supervised_examples(self, n: int, worked_share: float, seed: int) -> list[tuple[str, str]]:
        """Return (prompt, answer text) pairs. Some repeat: only a few thousand problems have a single operation."""
        section, rng = self._section, random.Random(f"supervised {seed}")
        examples = []
        for _ in range(n):
            story = self._draw(rng, "supervised", 1, section.supervised_max_operations)
            steps = story.steps if rng.random() < worked_share else ""
            examples.append((story.prompt, f"{steps}\\boxed{{{story.answer}}}"))
        return examples

    def gate_problems(self, n: int) -> Sequence[Problem]:
        """Return `n` distinct problems of the gate part."""
        return self._distinct("gate", n, EVAL_SEED, "gate problems")

    def force_steps(self, problem: Problem) -> Problem:
        """Append the prompt's first number to the prompt: a continuation can then only show the worked steps."""
        first = re.search(r"[0-9]+", problem.prompt)
        assert first is not None, problem.prompt
        return Problem(problem.prompt + first.group(), problem.answer)

    def _distinct(self, part: Part, n: int, seed: int, what: str) -> tuple[Problem, ...]:
        section, rng = self._section, random.Random(f"{part} {seed}")

        def draw() -> Problem:
            story = self._draw(rng, part, section.min_operations, section.max_operations)
            return Problem(story.prompt, str(story.answer))

        problems = distinct(draw, n)
        if len(problems) == n:
            return problems
        raise ConfigError(
            f"task.{what}: found {len(problems)} distinct problems of {section.min_operations} to "
            f"{section.max_operations} operations; wanted {n}: "
            "ask for fewer, or raise task.max_operations"
        )

    def _draw(self, rng: random.Random, part: Part, low: int, high: int) -> _Story:
        for _ in range(10_000):
            story = _story(rng, rng.randint(low, high))
            if part_of(story.prompt) == part:
                return story
        raise ConfigError(
            f"task: no problem of {low} to {high} operations belongs to the {part} part; raise the number of operations"
        )


def part_of(prompt: str) -> Part:
    """Return the part that the prompt's hash assigns the problem to."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return _PARTS[int.from_bytes(digest, "big") % len(_PARTS)]


def _story(rng: random.Random, operations: int) -> _Story:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    value = rng.randint(1, MAX_VALUE)
    clauses, values = [f"{name} has {value} {item}"], [value]
    for _ in range(operations):
        change = rng.choice(_CHANGES[value])  # all are equally likely
        clauses.append(rng.choice(GAINS if change > 0 else LOSSES).format(abs(change)))
        value += change
        values.append(value)
    return _Story(f"{', '.join(clauses)}. How many {item} does {name} have?\n", values)
