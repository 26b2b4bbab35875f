"""Word problems with numbers too large for a small model's head, and a calculator that it may ask.

    Tom has 34 boxes of 87 pens, finds 512 more. How many pens does Tom have?
    <<34*87>>           the model asks: a turn ends with >>
    =2958               the calculator replies
    <<2958+512>>
    =3470
    \\boxed{3470}        the last turn; a direct answer is this line alone

A problem of k operations has k - 1 changes after the product. As in `arithmetic`, a hash of the prompt decides which
part a problem belongs to.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rlsys.config import TaskSection
from rlsys.data.problems import Problem, distinct
from rlsys.errors import ConfigError
from rlsys.tasks.arithmetic import ITEMS, NAMES, Arithmetic, Part, part_of

GAINS, LOSSES = ("finds {} more", "buys {} more"), ("loses {}", "gives away {}")
MAX_CHARACTERS = 60  # of an expression
MAX_DIGITS = 15  # of a number in it, and of its value
NOT_UNDERSTOOD = "=?\n"
TRAIN_PROBLEMS, EVAL_PROBLEMS = 4096, 200


class _Story(NamedTuple):
    prompt: str
    expressions: tuple[str, ...]
    answer: int


class Calculator:
    """Factors of two digits, changes of three; no running value is below 0."""

    stop = (">>",)  # ends a turn, beside the model's own end

    def __init__(self, section: TaskSection, seed: int) -> None:
        if section.min_operations > section.max_operations:
            raise ConfigError(
                f"task.min_operations: found {section.min_operations}; wanted at most task.max_operations = "
                f"{section.max_operations}"
            )
        self._section = section
        self._splits = {
            "train": self._distinct("train", section.train_problems or TRAIN_PROBLEMS, seed),
            "eval": self._distinct("eval", section.eval_problems or EVAL_PROBLEMS, section.eval_seed),
        }

    def problems(self, split: Literal["train", "eval"]) -> Sequence[Problem]:
        """Distinct problems; those of eval depend on `eval_seed` alone."""
        return self._splits[split]

    @staticmethod
    def grade(completion: str, answer: str) -> float:
        """1 if the last box or #### line holds the answer as a number, else 0."""
        return Arithmetic.grade(completion, answer)

    @staticmethod
    def reply(turns: Sequence[str], answer: str) -> str | None:
        """What the last turn's <<expression>> is worth; a turn that does not end with >> is the model's last.

        Where << is missing, as in a turn that was begun for the model, the expression begins with the turn.
        """
        asked = re.search(r"(?:<<|\A)([^<>]*)>>\s*\Z", turns[-1])
        if asked is None:
            return None
        value = evaluate(asked[1])
        return NOT_UNDERSTOOD if value is None else f"={value}\n"

    def supervised_examples(self, n: int, worked_share: float, seed: int) -> list[tuple[str, ...]]:
        """(prompt, turn, reply, turn, reply, ..., last turn), of `worked_share` of them; else (prompt, last turn)."""
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
        return self._distinct("gate", n, self._section.eval_seed)

    def force_steps(self, problem: Problem) -> Problem:
        """The prompt followed by the beginning of a question to the calculator."""
        return Problem(problem.prompt + "<<", problem.answer)

    def _distinct(self, part: Part, n: int, seed: int) -> tuple[Problem, ...]:
        section, rng = self._section, random.Random(f"{part} {seed}")

        def draw() -> Problem:
            story = self._draw(rng, part, section.min_operations, section.max_operations)
            return Problem(story.prompt, str(story.answer))

        found = distinct(draw, n)
        if len(found) == n:
            return found
        raise ConfigError(
            f"task: found {len(found)} distinct problems of {section.min_operations} to {section.max_operations} "
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


def evaluate(expression: str) -> int | None:
    """The value of whole numbers, + - * / and brackets; None if it is anything else, or no whole number, or too long.

    A parser of its own, in which nothing can be named or called, and every value is bounded before the next is made.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    tokens = re.findall(r"[0-9]+|[-+*/()]|\S", expression)
    try:
        value, rest = _sum(tokens)
    except _NotUnderstood:
        return None
    return None if rest else value


class _NotUnderstood(Exception):
    pass


def _bounded(value: int) -> int:
    if abs(value) >= 10**MAX_DIGITS:
        raise _NotUnderstood
    return value


def _sum(tokens: list[str]) -> tuple[int, list[str]]:
    """sum: product (+|- product)*"""
    value, rest = _product(tokens)
    while rest and rest[0] in "+-":
        sign = 1 if rest[0] == "+" else -1
        term, rest = _product(rest[1:])
        value = _bounded(value + sign * term)
    return value, rest


def _product(tokens: list[str]) -> tuple[int, list[str]]:
    """product: factor (*|/ factor)*"""
    value, rest = _factor(tokens)
    while rest and rest[0] in "*/":
        by, after = _factor(rest[1:])
        if rest[0] == "/" and (by == 0 or value % by):
            raise _NotUnderstood
        value, rest = _bounded(value * by if rest[0] == "*" else value // by), after
    return value, rest


def _factor(tokens: list[str]) -> tuple[int, list[str]]:
    """factor: number | -factor | (sum). As deep as an expression is long at most."""
    first, rest = (tokens[0], tokens[1:]) if tokens else ("", [])
    if first == "-":
        value, rest = _factor(rest)
        return -value, rest
    if first == "(":
        value, rest = _sum(rest)
        if rest[:1] != [")"]:
            raise _NotUnderstood
        return value, rest[1:]
    if not (first.isascii() and first.isdecimal()) or len(first) > MAX_DIGITS:
        raise _NotUnderstood
    return int(first), rest
