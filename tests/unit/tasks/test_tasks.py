import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rlsys import tasks
from rlsys.config import ColumnSection, PromptSection, SourceSection, SupervisedSection, TaskSection, parse_config
from rlsys.data.problems import Problem
from rlsys.errors import ConfigError
from rlsys.tasks.arithmetic import Arithmetic
from rlsys.tasks.problem_sets import problem_sets
from rlsys.tokenization.renderer import Renderer
from tests.unit.tokenization.test_renderer import CHATML, tokenizer_of

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


def test_a_seed_gives_the_problems_that_it_always_gave() -> None:
    """A run that goes on is refused with other problems, and results of other days are of these."""
    section = TaskSection(name="arithmetic", min_operations=1, max_operations=8, train_problems=300, eval_problems=50)
    task = Arithmetic(section, seed=7)
    problems = [*task.problems("train"), *task.problems("eval")]
    texts = [f"{problem.prompt}|{problem.answer}" for problem in problems]
    texts += ["|".join(example) for example in task.supervised_examples(200, 0.5, seed=3)]
    texts += [problem.prompt for problem in task.gate_problems(20)]
    assert hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest() == "80c9a93810e497aa"


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
    section = TaskSection(train_problems=4_500, min_operations=1, max_operations=1)
    with pytest.raises(ConfigError, match=r"task.train_problems: found \d+ distinct .* wanted 4500: .*max_operations"):
        Arithmetic(section, seed=0)


def test_a_range_of_operations_upside_down_is_refused() -> None:
    section = TaskSection(min_operations=3, max_operations=2)
    with pytest.raises(ConfigError, match=r"task\.min_operations: found 3; wanted at most task\.max_operations = 2"):
        Arithmetic(section, seed=0)


SHIPPED = Path(__file__).parents[1] / "data" / "gsm8k_like.jsonl"
COLUMNS = ColumnSection()


def shipped(**section: Any) -> tasks.Task:
    source = SourceSection(path=str(SHIPPED))
    return tasks.build(TaskSection(**{"name": "gsm8k", "train": source, "eval": source, **section}), seed=0)


def numbered(path: Path, count: int) -> SourceSection:
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(count)))
    return SourceSection(path=str(path))


def numbers(problems: Sequence[Problem]) -> list[int]:
    return [int(problem.prompt.split()[0]) for problem in problems]


def test_a_job_that_says_nothing_gets_4096_problems_and_200_held_out() -> None:
    task = tasks.build(TaskSection(), seed=0)
    assert (len(task.problems("train")), len(task.problems("eval"))) == (4096, 200)


def test_the_answer_of_a_worked_solution_is_what_its_mark_says() -> None:
    task = shipped()
    assert [problem.answer for problem in task.problems("train")] == ["15", "245", "1,500", "16", "65", "-2"]


def test_each_reference_solution_is_right_by_its_own_answer_and_by_no_other() -> None:
    task = shipped()
    solutions = [json.loads(line)["answer"] for line in SHIPPED.read_text().splitlines()]
    answers = [problem.answer for problem in task.problems("train")]
    grades = [[task.grade(solution, answer) for answer in answers] for solution in solutions]
    assert grades == [[float(i == j) for j in range(len(answers))] for i in range(len(answers))]


@pytest.mark.parametrize("name", ["gsm8k", "math", "deepscaler"])
def test_what_a_task_names_of_its_own_can_be_replaced(name: str) -> None:
    columns = ColumnSection(prompt="question", answer="answer")
    task = shipped(name=name, columns=columns)
    assert len(task.problems("train")) == 6
    assert task.grade("so \\boxed{1500}", task.problems("train")[2].answer) == 1.0


def test_any_data_set_is_a_task_once_its_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text('{"q": "half of one?", "a": "\\\\frac{1}{2}"}\n{"q": "two?", "a": 2}\n{"q": "none?", "a": null}\n')
    source, columns = SourceSection(path=str(path)), ColumnSection(prompt="q", answer="a")
    task = tasks.build(TaskSection(name="dataset", train=source, eval=source, columns=columns), seed=0)
    assert task.problems("eval") == (Problem("half of one?", "\\frac{1}{2}"), Problem("two?", "2"))
    assert task.grade("\\boxed{0.5}", "\\frac{1}{2}") == 1.0
    assert isinstance(task, tasks.CountingTask)
    assert task.facts() == {"task/train_unusable": 1.0, "task/eval_unusable": 1.0}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"task\.train is required: .*train: \{path: problems\.jsonl\}"),
        ({"train": SourceSection(path=str(SHIPPED))}, r"task\.columns is required: .*columns: \{prompt: question"),
    ],
)
def test_a_data_set_that_is_not_fully_named_is_refused_with_what_to_write(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks.build(TaskSection(name="dataset", **section), seed=0)


def test_without_a_held_out_set_a_part_of_train_is_kept_apart_for_every_seed(tmp_path: Path) -> None:
    source = numbered(tmp_path / "numbers.jsonl", 400)
    section = TaskSection(name="dataset", train=source, columns=COLUMNS, eval_share=0.25)
    one, other = tasks.build(section, seed=0), tasks.build(section, seed=1)
    train, held_out = numbers(one.problems("train")), numbers(one.problems("eval"))
    assert 70 < len(held_out) < 130
    assert sorted(train + held_out) == list(range(400))
    assert (train, held_out) == (numbers(other.problems("train")), numbers(other.problems("eval")))


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    source = numbered(tmp_path / "numbers.jsonl", 2)
    with pytest.raises(ConfigError, match=r"task\.eval_share: 0\.01 .* 0 held-out problems;"):
        tasks.build(TaskSection(name="dataset", train=source, columns=COLUMNS, eval_share=0.01), seed=0)


def test_fewer_problems_are_drawn_by_the_seed_and_held_out_ones_by_none(tmp_path: Path) -> None:
    source = numbered(tmp_path / "numbers.jsonl", 200)
    section = TaskSection(
        name="dataset", train=source, eval=source, columns=COLUMNS, train_problems=20, eval_problems=10
    )
    drawn = {seed: tasks.build(section, seed) for seed in (0, 1)}
    train = {seed: numbers(task.problems("train")) for seed, task in drawn.items()}
    assert train[0] != train[1]
    assert all(len(ids) == 20 and ids == sorted(ids) for ids in train.values())
    assert train[0] != list(range(20))  # data sets are sorted: the first ones are no sample
    assert drawn[0].problems("eval") == drawn[1].problems("eval")
    assert tasks.build(section, 0).problems("train") == drawn[0].problems("train")


def test_more_problems_than_a_data_set_has_are_all_of_them() -> None:
    assert len(shipped(train_problems=1000).problems("train")) == 6


class OwnTask:
    def __init__(self, section: TaskSection, seed: int) -> None:
        self.options = section.options

    def problems(self, split: tasks.Split) -> Sequence[Problem]:
        return [Problem(f"{split}?", str(self.options["right"]))]

    @staticmethod
    def grade(completion: str, answer: str) -> float:
        return float(completion == answer)


class NoGrade:
    def __init__(self, section: TaskSection, seed: int) -> None:
        pass

    def problems(self, split: tasks.Split) -> Sequence[Problem]:
        return []


class NoSeed:
    def __init__(self, section: TaskSection) -> None:
        pass


def test_a_task_of_the_users_own_is_named_by_path_and_gets_its_options() -> None:
    task = tasks.build(TaskSection(name="tests.unit.tasks.test_tasks:OwnTask", options={"right": 7}), seed=0)
    assert task.problems("eval") == [Problem("eval?", "7")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", r"found 'gsm8'; wanted one of .*'package\.module:Class'; did you mean 'gsm8k'"),
        ("tests.unit.tasks.test_tasks:", r"found 'tests.unit.tasks.test_tasks:'; wanted one of"),
        ("no.such.module:Task", r"importing no\.such\.module raised ModuleNotFoundError.*PYTHONPATH"),
        (
            "tests.unit.tasks.test_tasks:OwnTsk",
            r"tests\.unit\.tasks\.test_tasks has no 'OwnTsk'; did you mean 'OwnTask'",
        ),
        ("tests.unit.tasks.test_tasks:values_of", r"is a function; wanted a class"),
        ("tests.unit.tasks.test_tasks:NoGrade", r"has no method grade; see docs/extending\.md"),
        (
            "tests.unit.tasks.test_tasks:NoSeed",
            r"cannot be constructed as NoSeed\(section, seed\): too many positional",
        ),
    ],
)
def test_a_wrong_path_is_refused_with_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"task\.name: .*{message}"):
        tasks.build(TaskSection(name=name), seed=0)


DOCS = Path(__file__).parents[3] / "docs"


def snippet(document: str, first_line: str) -> str:
    """The block of a document that begins with this line."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", (DOCS / document).read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if block.startswith(first_line))


def test_the_task_that_the_docs_show_is_a_task_in_under_twenty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = snippet("extending.md", "# my_tasks.py")
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    task = tasks.build(TaskSection(name="my_tasks:Doubling", train_problems=500), seed=0)
    sets = problem_sets(task, lambda prompts: [[ord(character) for character in str(prompt)] for prompt in prompts])
    assert (len(sets.train), len(sets.eval)) == (500, 100)
    assert task.grade("It is 14", sets.eval.answers[7]) == 1.0
    assert len(tasks.build(TaskSection(name="my_tasks:Doubling", options={"count": 7}), 0).problems("train")) == 7


def test_the_data_set_that_the_docs_show_is_a_task_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sets.py").write_text(snippet("extending.md", "# my_sets.py"))
    (tmp_path / "data").mkdir()
    rows = [{"problem": f"What is {i} + {i}?", "solution": f"It is \\boxed{{{2 * i}}}."} for i in range(200)]
    (tmp_path / "data" / "olympiad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    task = tasks.build(TaskSection(name="my_sets:Olympiad"), seed=0)
    assert len(task.problems("train")) + len(task.problems("eval")) == 200
    assert task.grade("\\boxed{0}", task.problems("train")[0].answer) == 1.0


def test_the_data_set_section_that_the_docs_show_loads() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "tasks.md").read_text(encoding="utf-8"), re.DOTALL)
    job = parse_config("run: {name: a}\nmodel: {make: {}}\n" + "".join(blocks))
    assert job.task.name == "dataset"
    assert job.prompt.max_tokens == 512


def test_a_data_set_in_verls_form_is_rendered_as_its_messages_and_graded(tmp_path: Path) -> None:
    def row(i: int) -> dict[str, Any]:
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i} + {i}?"}]
        return {
            "data_source": "openai/gsm8k",
            "prompt": said[i % 2 :],  # every other one without a system message
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"split": "train", "index": i},
        }

    sources = {}
    for split, rows in (("train", range(4)), ("eval", range(4, 6))):
        sources[split] = SourceSection(path=str(tmp_path / f"{split}.parquet"))
        parquet.write_table(pyarrow.Table.from_pylist(list(map(row, rows))), sources[split].path)
    columns = ColumnSection(prompt="prompt", answer="reward_model.ground_truth")
    task = tasks.build(TaskSection(name="dataset", columns=columns, **sources), seed=0)
    renderer = Renderer(tokenizer_of(CHATML), PromptSection())
    sets = problem_sets(task, renderer.ids_of_each)
    assert sets.train.prompts == ("0 + 0?", "1 + 1?", "2 + 2?", "3 + 3?")
    assert sets.eval.answers == ("8", "10")
    tokens, offsets = sets.train.select([2, 3])
    said = (("system", "Be brief."), ("user", "2 + 2?"))
    assert tokens[: offsets[1]].tolist() == renderer.ids(said)
    assert tokens[offsets[1] :].tolist() == renderer.ids("3 + 3?")
    assert task.grade("\\boxed{8}", sets.eval.answers[0]) == 1.0
