"""Claims about the calculator and the problems that need it."""

from __future__ import annotations

import pickle
import time

import pytest

from rlsys import tasks
from rlsys.config import TaskSection
from rlsys.errors import ConfigError
from rlsys.tasks import ConversationTask, TeachableTask, converses
from rlsys.tasks.calculator import Calculator, calculate

SECTION = TaskSection(name="calculator", train_problems=200, eval_problems=50, min_operations=1, max_operations=2)
TASK = Calculator(SECTION, 3)


def ask(*turns: str) -> str | None:
    return Calculator.reply(turns, "")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("34*87", 2958),
        ("2958+512", 3470),
        (" 7 - 10 ", -3),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-(2+3)*-4", 20),
        ("100-50-25", 25),
        ("12/4/3", 1),
        ("007*2", 14),
        ("999999999999999", 10**15 - 1),
    ],
)
def test_arithmetic_is_done_as_on_paper(expression: str, value: int) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "3+",
        "*3",
        "3 4",
        "(3",
        "3)",
        "7/2",
        "7/0",
        "2**9",
        "9//2",
        "1e9",
        "1.5",
        "9" * 16,
        "99999999*99999999",
        "999999999999999+1",
        "__import__('os').system('true')",
        "x",
        "3 if 1 else 2",
        "\N{ARABIC-INDIC DIGIT THREE}+1",
        "\N{SUPERSCRIPT TWO}+1",
        "(" * 59,
        "-" * 59,
        "1+" * 40 + "1",
        "9" * 100_000,
    ],
)
def test_what_is_not_arithmetic_of_whole_numbers_or_too_long_is_not_understood(expression: str) -> None:
    began = time.process_time()
    assert calculate(expression) is None
    assert time.process_time() - began < 0.5


def test_a_turn_that_asks_is_answered_and_one_that_does_not_is_the_last() -> None:
    assert ask("<<34*87>>") == "=2958\n"
    assert ask("<<34*87>>", "so <<2958+512>>\n") == "=3470\n"
    assert ask("34*87>>") == "=2958\n"
    assert ask("<<<<3+4>>") == "=7\n"
    assert ask("<<34*>>") == "=?\n"
    assert ask("three times four>>") == "=?\n"
    assert ask("<<34*87>>", "\\boxed{2958}") is None
    assert ask("<<34*87>> is much") is None
    assert ask("") is None


def test_it_is_a_task_that_converses_and_that_a_base_can_be_taught_from() -> None:
    assert isinstance(TASK, ConversationTask) and isinstance(TASK, TeachableTask)
    assert isinstance(tasks.build(SECTION, 3), Calculator)
    assert converses(SECTION) and not converses(TaskSection())
    assert len(pickle.dumps(TASK.reply)) < 1000, "the processes that reply need no problems"


def test_following_a_worked_example_through_the_environment_earns_the_reward() -> None:
    examples = TASK.supervised_examples(300, 0.5, 0)
    worked = [texts for texts in examples if len(texts) > 2]
    assert 100 < len(worked) < 200
    for prompt, *parts in worked:
        turns = parts[::2]
        assert [ask(*turns[: i + 1]) for i in range(len(turns))] == [*parts[1::2], None]
        assert TASK.grade("\n".join(turns), turns[-1].removeprefix("\\boxed{").removesuffix("}")) == 1.0
        assert prompt.endswith("have?\n")
    assert {len(texts) for texts in examples} == {2, 4, 6}  # direct, one operation, two


def test_the_parts_share_no_problem_and_eval_depends_on_its_own_seed_alone() -> None:
    train, held_out = ({p.prompt for p in TASK.problems(split)} for split in ("train", "eval"))
    gate = {p.prompt for p in TASK.gate_problems(40)}
    taught = {texts[0] for texts in TASK.supervised_examples(2000, 0.5, 0)}
    assert (len(train), len(held_out), len(gate)) == (200, 50, 40)
    assert not train & held_out and not (train | held_out) & gate and not (train | held_out | gate) & taught
    other = Calculator(SECTION, 4)
    assert other.problems("eval") == TASK.problems("eval")
    assert other.problems("train") != TASK.problems("train")


def test_answers_are_those_of_the_worked_steps_and_never_below_zero() -> None:
    for problem in TASK.problems("train"):
        numbers = [int(word) for word in problem.prompt.replace(",", " ").replace(".", " ").split() if word.isdigit()]
        value = numbers[0] * numbers[1]
        for change, clause in zip(numbers[2:], problem.prompt.split(",")[1:], strict=True):
            value += change if "finds" in clause or "buys" in clause else -change
        assert int(problem.answer) == value >= 0


def test_a_range_of_operations_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.min_operations: found 3; wanted at most task\.max_operations = 2"):
        Calculator(TaskSection(name="calculator", min_operations=3, max_operations=2), 0)
