"""Generated word problems with large numbers, and a calculator tool that the model can call.

    Tom has 34 boxes of 87 pens, finds 512 more. How many pens does Tom have?
    <<34*87>>           the model calls the calculator: a turn ends with >>
    =2958               the calculator replies
    <<2958+512>>
    =3470
    \\boxed{3470}        the last turn; a direct answer is only this line

A problem of k operations is a product followed by k - 1 additions and subtractions. As in `arithmetic`, a hash of the
prompt assigns each problem to a part.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlsys.data.problems import EVAL_SEED, Problem, distinct
from rlsys.errors import ConfigError
from rlsys.tasks.arithmetic import ITEMS, NAMES, Arithmetic, Part, part_of

if TYPE_CHECKING:  # grader processes import this module, and no configuration
    from rlsys.config import TaskSection

GAINS, LOSSES = ("finds {} more", "buys {} more"), ("loses {}", "gives away {}")
MAX_CHARACTERS = 60  # in an expression
MAX_DIGITS = 15  # of each number in an expression, of each intermediate result and of its value
NOT_UNDERSTOOD = "=?\n"
TRAIN_PROBLEMS, EVAL_PROBLEMS = 4096, 200


class _Story(NamedTuple):
    prompt: str
    expressions: tuple[str, ...]
    answer: int


class Calculator:
    """Task `calculator`: two-digit factors, three-digit summands, no negative intermediate result."""

    stop = (">>",)  # ends a turn, in addition to the model's end tokens

    def __init__(self, section: TaskSection, seed: int) -> None:
        if section.min_operations > section.max_operations:
            raise ConfigError(
                f"task.min_operations: found {section.min_operations}; wanted at most task.max_operations = "
                f"{section.max_operations}"
            )
        self._section = section
        self._splits = {
            "train": self._distinct("train", section.train_problems or TRAIN_PROBLEMS, seed),
            "eval": self._distinct("eval", section.eval_problems or EVAL_PROBLEMS, EVAL_SEED),
        }

    def problems(self, split: Literal["train", "eval"]) -> Sequence[Problem]:
        """Return distinct problems; the eval split does not depend on the run's seed."""
        return self._splits[split]

    @staticmethod
    def grade(completion: str, answer: str) -> float:
        """Return 1 if the last box or #### line contains the answer as a number, else 0."""
        return Arithmetic.grade(completion, answer)

    @staticmethod
    def reply(turns: Sequence[str], answer: str) -> str | None:
        """Return the value of the last turn's <<expression>>; None, the end, if the turn does not end with >>.

        Without <<, the expression starts where the turn starts: the prompts of `force_steps` already end with <<.
        """
        call = re.search(r"(?:<<|\A)([^<>]*)>>\s*\Z", turns[-1])
        if call is None:
            return None
        value = calculate(call[1])
        return NOT_UNDERSTOOD if value is None else f"={value}\n"

    def supervised_examples(self, n: int, worked_share: float, seed: int) -> list[tuple[str, ...]]:
        """Return examples: a share `worked_share` is (prompt, turn, reply, ..., last turn), others (prompt, last turn).

        See ``TeachableTask``.
        """
        section, rng = self._section, random.Random(f"supervised {seed}")
        examples = []
        for _ in range(n):
            story = self._draw(rng, "supervised", section.min_operations, section.max_operations)
            texts = [story.prompt]
            if rng.random() < worked_share:
                for expression in story.expressions:
                    turn = f"<<{expression}>>"
                    texts += [turn, self.reply([turn], "") or ""]
            examples.append((*texts, f"\\boxed{{{story.answer}}}"))
        return examples

    def gate_problems(self, n: int) -> Sequence[Problem]:
        """Return `n` distinct problems of the gate part."""
        return self._distinct("gate", n, EVAL_SEED)

    def force_steps(self, problem: Problem) -> Problem:
        """Append <<, the start of a call to the calculator, to the prompt."""
        return Problem(problem.prompt + "<<", problem.answer)

    def _distinct(self, part: Part, n: int, seed: int) -> tuple[Problem, ...]:
        section, rng = self._section, random.Random(f"{part} {seed}")

        def draw() -> Problem:
            story = self._draw(rng, part, section.min_operations, section.max_operations)
            return Problem(story.prompt, str(story.answer))

        problems = distinct(draw, n)
        if len(problems) == n:
            return problems
        raise ConfigError(
            f"task: found {len(problems)} distinct problems of {section.min_operations} to {section.max_operations} "
            f"operations for the {part} part; wanted {n}: ask for fewer, or raise task.max_operations"
        )

    @staticmethod
    def _draw(rng: random.Random, part: Part, low: int, high: int) -> _Story:
        while True:
            story = _story(rng, rng.randint(low, high))
            if part_of(story.prompt) == part:
                return story


def _story(rng: random.Random, operations: int) -> _Story:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    boxes, each = rng.randint(12, 99), rng.randint(12, 99)
    value = boxes * each
    clauses, expressions = [f"{name} has {boxes} boxes of {each} {item}"], [f"{boxes}*{each}"]
    for _ in range(operations - 1):
        change = rng.randint(100, 999)
        gains = change > value or rng.random() < 0.5
        clauses.append(rng.choice(GAINS if gains else LOSSES).format(change))
        expressions.append(f"{value}{'+' if gains else '-'}{change}")
        value += change if gains else -change
    return _Story(f"{', '.join(clauses)}. How many {item} does {name} have?\n", tuple(expressions), value)


def calculate(expression: str) -> int | None:
    """Return the integer value of an expression of integers, + - * / and parentheses.

    None if the expression has any other syntax, is too long, or an intermediate result is no integer or too large.
    The parser knows no names and no calls, and bounds every intermediate result before it computes the next: text
    from the model is safe to pass in.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    tokens = re.findall(r"[0-9]+|[-+*/()]|\S", expression)
    try:
        value, rest = _sum(tokens)
    except _NoValueError:
        return None
    return None if rest else value


class _NoValueError(Exception):
    pass


def _bounded(value: int) -> int:
    if abs(value) >= 10**MAX_DIGITS:
        raise _NoValueError
    return value


def _sum(tokens: list[str]) -> tuple[int, list[str]]:
    """Parse sum: product (+|- product)*"""
    value, rest = _product(tokens)
    while rest and rest[0] in "+-":
        sign = 1 if rest[0] == "+" else -1
        term, rest = _product(rest[1:])
        value = _bounded(value + sign * term)
    return value, rest


def _product(tokens: list[str]) -> tuple[int, list[str]]:
    """Parse product: factor (*|/ factor)*"""
    value, rest = _factor(tokens)
    while rest and rest[0] in "*/":
        factor, after = _factor(rest[1:])
        if rest[0] == "/" and (factor == 0 or value % factor):
            raise _NoValueError
        value, rest = _bounded(value * factor if rest[0] == "*" else value // factor), after
    return value, rest


def _factor(tokens: list[str]) -> tuple[int, list[str]]:
    """Parse factor: number | -factor | (sum). MAX_CHARACTERS bounds the recursion depth."""
    first, rest = (tokens[0], tokens[1:]) if tokens else ("", [])
    if first == "-":
        value, rest = _factor(rest)
        return -value, rest
    if first == "(":
        value, rest = _sum(rest)
        if rest[:1] != [")"]:
            raise _NoValueError
        return value, rest[1:]
    if not (first.isascii() and first.isdecimal()) or len(first) > MAX_DIGITS:
        raise _NoValueError
    return int(first), rest
