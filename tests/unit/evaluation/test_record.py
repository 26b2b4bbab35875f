"""An evaluation is written whole, read as it was, and compared only with one of the same problems."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rlsys.config import parse_config
from rlsys.errors import ConfigError
from rlsys.evaluation.record import EvalRecord, GradedCompletion, compare, read, text, write
from rlsys.evaluation.statistics import difference, evaluation_of


def record(name: str = "step-000007", solved: tuple[float, ...] = (1.0, 0.0, 1.0, 1.0), samples: int = 2) -> EvalRecord:
    passed = np.array([2, 0, 1, 2]) if samples else None
    ks = "[1,2]" if samples else "[1]"
    config = parse_config(
        "{run: {name: gsm8k}, model: {path: x}}", [f"eval.samples={samples}", f"eval.pass_k={ks}", "eval.max_tokens=40"]
    )
    found = evaluation_of(np.array(solved), passed, samples, config.eval.pass_k, 0.9)
    return EvalRecord(
        kind="adapter",
        name=name,
        checkpoint="/runs/gsm8k/checkpoints/step-000007",
        base="Qwen/Qwen3-0.6B",
        version=7,
        time=1_700_000_000.0,
        config=config.model_dump(mode="json"),
        versions={"rlsys": "0", "torch": "2"},
        facts={**found.metrics(), "eval/mean_tokens": 31.25, "eval/truncated_share": 0.25, "time/eval_s": 2.0},
        confidence=0.9,
        problems=[
            GradedCompletion(i, f"How many is {i}? ½", str(i), grade, None if passed is None else int(passed[i]))
            for i, grade in enumerate(solved)
        ],
    )


def test_a_record_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    for wanted in (record(), record("base", samples=0)):
        data, _ = write(wanted, tmp_path / "eval")
        assert read(data) == wanted and data.name == f"{wanted.name}.json"


def test_the_file_is_plain_json_with_every_figure_and_every_problem(tmp_path: Path) -> None:
    data, _ = write(record(), tmp_path)
    body = json.loads(data.read_text("utf-8"), parse_constant=pytest.fail)
    assert (body["format"], body["format_version"]) == ("rlsys-evaluation", 1)
    assert body["facts"]["eval/accuracy"] == 0.75 and body["facts"]["eval/pass_at_2"] == 0.75
    assert body["problems"][1] == {"id": 1, "prompt": "How many is 1? ½", "answer": "1", "grade": 0.0, "passed": 0}
    assert body["config"]["run"]["name"] == "gsm8k" and body["versions"]["torch"] == "2"


def test_the_table_has_each_figure_with_both_ends() -> None:
    shown = text(record())
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in shown.splitlines() if "|" in line]
    assert cells[0][1:] == ["value", "90 % low", "90 % high"]
    facts = record().facts
    for label, name in (("greedy accuracy", "accuracy"), ("pass@1", "pass_at_1"), ("pass@2", "pass_at_2")):
        ends = [f"{facts[f'eval/{name}{end}']:.4f}" for end in ("", "_low", "_high")]
        assert [label, *ends] in cells
    assert "adapter at version 7" in shown and "4 held-out problems" in shown
    assert "pass@k from 2 completions each at temperature 1" in shown and "31.2" in shown


def test_grades_of_any_size_have_a_row_for_their_mean_and_one_for_what_is_solved() -> None:
    odd = record(solved=(-3.0, 2.5, 0.5, -10.0), samples=0)
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text(odd).splitlines() if "|" in line]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["greedy, mean grade"][0] == "-2.5000" and rows["greedy, grade 1 or more"][0] == "0.2500"
    assert float(rows["greedy, mean grade"][1]) < -2.5 < float(rows["greedy, mean grade"][2])
    better = record(solved=(-2.0, 4.0, 1.0, -9.0), samples=0)
    assert compare(odd, better).value == 1.0 and compare(odd, better).low > 0


def test_without_samples_the_table_has_no_pass_at_k() -> None:
    assert "pass@" not in text(record(samples=0))


def test_a_table_holds_whatever_a_path_or_name_says() -> None:
    odd = dataclasses.replace(record(), checkpoint="/runs/[bold]x[/]" + "y" * 200)
    assert f"checkpoint {odd.checkpoint}\n" in text(odd)


def test_two_records_are_compared_by_problem() -> None:
    before, after = record(solved=(0.0, 0.0, 1.0, 0.0)), record(solved=(1.0, 0.0, 1.0, 1.0))
    found = compare(before, after)
    assert found.value == 0.5
    assert found == difference(np.array([0.0, 0, 1, 0]), np.array([1.0, 0, 1, 1]), 0.9)


def test_records_of_other_problems_are_not_compared() -> None:
    other = record()
    problems = [*other.problems[:-1], dataclasses.replace(other.problems[-1], answer="17")]
    with pytest.raises(ConfigError, match=r"not evaluated on the same problems \(4 and 4\)"):
        compare(record(), dataclasses.replace(other, problems=problems))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not an evaluation of rlsys"),
        ("[]", "is not an evaluation of rlsys"),
        (
            '{"format": "other", "format_version": 1}',
            "found format 'other' version 1; wanted 'rlsys-evaluation' version 1",
        ),
        ('{"format": "rlsys-evaluation", "format_version": 1, "problems": []}', "is not an evaluation of rlsys"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"x\.json: {said}"):
        read(tmp_path / "x.json")


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/proc/nowhere: the evaluation cannot be written there"):
        write(record(), Path("/proc/nowhere"))
