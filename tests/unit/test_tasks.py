import itertools
import re

import pytest

from rlsys import tasks
from rlsys.config import SupervisedSection, TaskSection
from rlsys.errors import ConfigError
from rlsys.problems import Problem
from rlsys.tasks.arithmetic import Arithmetic

PROMPT = re.compile(
    r"(?P<name>[A-Z][a-z]+) has (?P<start>\d+) (?P<item>[a-z]+)(?P<clauses>.*)\. "
    r"How many (?P=item) does (?P=name) have\?\n"
)
CLAUSE = re.compile(r", (?:(?:buys|finds) (?P<gain>\d) more|(?:loses|gives away) (?P<loss>\d))")


def values_of(prompt: str) -> list[int]:
    """The running values of a word problem, read from its text alone."""
    story = PROMPT.fullmatch(prompt)
    assert story is not None, prompt
    clauses = list(CLAUSE.finditer(story["clauses"]))
    assert "".join(clause[0] for clause in clauses) == story["clauses"]
    values = [int(story["start"])]
    for clause in clauses:
        values.append(values[-1] + (int(clause["gain"]) if clause["gain"] else -int(clause["loss"])))
    return values


@pytest.fixture(scope="module")
def quickstart() -> Arithmetic:
    return Arithmetic(TaskSection(), seed=21)


def test_the_name_in_the_config_builds_the_task() -> None:
    task = tasks.build(TaskSection(train_problems=8, eval_problems=8), seed=0)
    assert isinstance(task, tasks.TeachableTask)


@pytest.mark.parametrize("seed", [21, 22, 23])
def test_held_out_problems_are_in_no_other_part_at_quickstart_size(seed: int) -> None:
    section, supervised = TaskSection(), SupervisedSection()
    task = Arithmetic(section, seed)
    held_out = {problem.prompt for problem in task.problems("eval")}
    trained = {problem.prompt for problem in task.problems("train")}
    gate = {problem.prompt for problem in task.gate_problems(supervised.gate_problems)}
    shown = {p for p, _ in task.supervised_examples(supervised.problems, supervised.worked_share, seed)}
    assert (len(held_out), len(trained), len(gate)) == (200, 4096, 60)
    assert len(shown) > 15_000  # of 20,000: only problems of one operation repeat much
    parts = (held_out, trained, gate, shown)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_runs_with_other_seeds_are_compared_on_the_same_held_out_problems(quickstart: Arithmetic) -> None:
    other = Arithmetic(TaskSection(), seed=22)
    assert other.problems("eval") == quickstart.problems("eval")
    assert other.gate_problems(60) == quickstart.gate_problems(60)
    assert other.problems("train") != quickstart.problems("train")


def test_the_same_seed_gives_the_same_task(quickstart: Arithmetic) -> None:
    again = Arithmetic(TaskSection(), seed=21)
    assert again.problems("train") == quickstart.problems("train")
    assert again.supervised_examples(100, 0.5, 1) == quickstart.supervised_examples(100, 0.5, 1)
    assert again.supervised_examples(100, 0.5, 1) != quickstart.supervised_examples(100, 0.5, 2)


def test_every_answer_follows_from_its_text_within_the_range(quickstart: Arithmetic) -> None:
    operations = set()
    for problem in [*quickstart.problems("train"), *quickstart.problems("eval")]:
        values = values_of(problem.prompt)
        assert values[0] >= 1 and min(values) >= 0 and max(values) <= 20
        assert problem.answer == str(values[-1])
        operations.add(len(values) - 1)
    assert operations == {3, 4}


def test_supervised_answers_work_their_steps_or_answer_at_once(quickstart: Arithmetic) -> None:
    examples = quickstart.supervised_examples(2000, 0.5, seed=3)
    worked, operations = 0, set()
    for prompt, answer in examples:
        values = values_of(prompt)
        steps = "".join(f"{a}{b - a:+d}={b}\n" for a, b in itertools.pairwise(values))
        boxed = f"\\boxed{{{values[-1]}}}"
        assert answer in (boxed, steps + boxed)
        worked += answer != boxed
        operations.add(len(values) - 1)
    assert operations == {1, 2, 3, 4}
    assert 900 < worked < 1100


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_worked_share_reaches_none_and_all(quickstart: Arithmetic, share: float) -> None:
    answers = [answer for _, answer in quickstart.supervised_examples(50, share, seed=0)]
    assert all(("=" in answer) == (share == 1.0) for answer in answers)


def test_forced_steps_begin_the_worked_answer(quickstart: Arithmetic) -> None:
    problem = Problem("Tom has 12 books, buys 4 more. How many books does Tom have?\n", "16")
    assert quickstart.force_steps(problem) == Problem(problem.prompt + "12", "16")


def test_the_last_box_earns_the_reward(quickstart: Arithmetic) -> None:
    assert quickstart.grade("12+4=16\n16-7=9\n9-3=6\n\\boxed{6}", "6") == 1.0
    assert quickstart.grade("\\boxed{5}\n\\boxed{6}", "6") == 1.0
    assert quickstart.grade("\\boxed{6}\n\\boxed{5}", "6") == 0.0
    assert quickstart.grade("6", "6") == 0.0
    assert quickstart.grade("", "6") == 0.0


def test_an_expression_in_the_box_earns_nothing(quickstart: Arithmetic) -> None:
    assert quickstart.grade("\\boxed{12+4-7-3}", "6") == 0.0


def test_more_problems_than_there_are_is_refused_with_the_way_out() -> None:
    section = TaskSection(train_problems=300, max_value=2, min_operations=1, max_operations=1)
    with pytest.raises(ConfigError, match=r"task.train_problems: found \d+ distinct .* wanted 300: .*max_operations"):
        Arithmetic(section, seed=0)


def test_a_range_of_operations_upside_down_is_refused() -> None:
    section = TaskSection(supervised_min_operations=3, supervised_max_operations=2)
    with pytest.raises(ConfigError, match="supervised_min_operations: found 3; wanted at most"):
        Arithmetic(section, seed=0)
