"""Claims about the two splits of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from rlsys.data.messages import Messages
from rlsys.data.problems import Problem
from rlsys.errors import ConfigError
from rlsys.tasks import Split
from rlsys.tasks.problem_sets import problem_sets


class Listed:
    """The problems that it is given."""

    def __init__(self, train: Sequence[Any], held_out: Sequence[Any]) -> None:
        self._splits = {"train": train, "eval": held_out}

    def problems(self, split: Split) -> Sequence[Any]:
        return self._splits[split]

    def grade(self, completion: str, answer: str) -> float:
        return float(completion == answer)


class Counted(Listed):
    def facts(self) -> Mapping[str, float]:
        return {"task/train_unusable": 3.0}


def asked(*prompts: str) -> list[Problem]:
    return [Problem(prompt, str(i)) for i, prompt in enumerate(prompts)]


def letters(prompts: Sequence[str | Messages]) -> list[list[int]]:
    assert all(isinstance(prompt, str) for prompt in prompts)
    return [[ord(character) for character in str(prompt)] for prompt in prompts]


def test_what_is_held_out_is_left_out_of_training_and_counted() -> None:
    sets = problem_sets(Listed(asked("a", "B?", "c", "c"), asked("x", "b")), letters)
    assert sets.train.prompts == ("a", "c", "c")
    assert sets.train.answers == ("0", "2", "3")
    assert sets.eval.prompts == ("x", "b")
    assert (sets.metrics["task/train_held_out"], sets.metrics["task/train_repeated"]) == (1.0, 1.0)


def test_long_prompts_are_dropped_from_both_splits_and_counted() -> None:
    sets = problem_sets(Counted(asked("a", "bbb", "cc"), asked("dddd", "e")), letters, max_tokens=2)
    assert sets.of("train").prompts == ("a", "cc")
    assert sets.of("eval").prompts == ("e",)
    assert sets.metrics == {
        "task/train_unusable": 3.0,
        "task/train_problems": 2.0,
        "task/train_dropped": 1.0,
        "task/eval_problems": 1.0,
        "task/eval_dropped": 1.0,
        "task/train_held_out": 0.0,
        "task/train_repeated": 0.0,
    }


def test_training_on_nothing_but_held_out_problems_is_refused_with_an_example() -> None:
    with pytest.raises(ConfigError, match=r"all 2 training .*problem 0 'a', held-out problem 1 'A\.'.*task\.eval"):
        problem_sets(Listed(asked("a", "b"), asked("b", "A.")), letters)


@pytest.mark.parametrize("wrong", [("a", "1"), Problem("a", 1), {"prompt": "a"}])  # type: ignore[arg-type]
def test_what_is_no_problem_is_refused_by_its_place(wrong: object) -> None:
    with pytest.raises(
        ConfigError, match=r"problem 1 of train is .*wanted rlsys\.data\.problems\.Problem\(prompt, answer\)"
    ):
        problem_sets(Listed([*asked("b"), wrong], asked("c")), letters)


@pytest.mark.parametrize(("train", "held_out"), [([], asked("a")), (asked("a"), [])])
def test_an_empty_split_is_refused(train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    with pytest.raises(ConfigError):
        problem_sets(Listed(train, held_out), letters)


def test_the_same_question_is_held_out_whatever_system_prompt_it_has() -> None:
    system = Problem.of_messages((("system", "Be brief."), ("user", "A?")), "1")
    assert (system.prompt, len(system.messages)) == ("A?", 2)
    sets = problem_sets(
        Listed([*asked("b"), system], asked("a")), lambda questions: [[len(question)] for question in questions]
    )
    assert sets.train.prompts == ("b",)


def test_messages_reach_the_renderer_and_their_text_the_records() -> None:
    said = (("user", "a?"), ("assistant", "b"), ("user", "c?"))
    seen: list[str | Messages] = []

    def encoded(questions: Sequence[str | Messages]) -> list[list[int]]:
        seen.extend(questions)
        return [[1]] * len(questions)

    problem_sets(Listed([Problem.of_messages(said, "1")], asked("x")), encoded)
    assert seen == [said, "x"]
    assert Problem.of_messages(said, "1").prompt == "user: a?\nassistant: b\nuser: c?"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Problem("a", "1", ("user", "a")), r"wanted a tuple of \(role, content\)"),  # type: ignore[arg-type]
        (Problem("a", "1", [("user", "a")]), r"wanted a tuple of \(role, content\)"),  # type: ignore[arg-type]
        (Problem("a", "1", (("tool", "a"),)), "a message with the role 'tool'"),
        (Problem("a", "1", (("user", "a"), ("assistant", "b"))), "ends with a message of the role 'assistant'"),
        (Problem("half \ud83d", "1"), "an unpaired surrogate"),
        (Problem("a", "\ud83d"), "an unpaired surrogate"),
        (Problem("a", "1", (("user", "\ud83d"),)), "an unpaired surrogate"),
    ],
)
def test_messages_and_texts_that_cannot_be_written_are_refused_by_their_place(wrong: Problem, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"task: problem 1 of train, .*{why}"):
        problem_sets(Listed([*asked("b"), wrong], asked("c")), letters)
