"""The page of measured ratios says what the benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rows import RESULTS, Row, Target, by_turns, finish, ratios, table

PAGE = Path(__file__).parents[3] / "docs" / "performance.md"


def test_every_line_of_the_table_comes_from_a_file_of_results() -> None:
    lines = table().splitlines()
    assert len(lines) > 2 and len(list(RESULTS.glob("*.json"))) > 2
    assert set(lines) <= set(PAGE.read_text(encoding="utf-8").splitlines())


def test_sides_take_turns_and_warm_ups_are_left_out() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = by_turns({"a": lambda: side("a"), "b": lambda: side("b")}, repeats=2, warmups=1)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize(("sense", "verdict"), [(">=", "met"), ("<=", "MISSED")])
def test_a_ratio_is_the_median_of_those_within_a_repetition(
    sense: str, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {"ours": [2.0, 9.0, 30.0], "theirs": [1.0, 3.0, 20.0]}
    row = Row("row", "a row", "command", "s", sides, [Target("ours", "theirs", 1.9, sense)])  # type: ignore[arg-type]
    assert ratios(row, row.targets[0]) == [2.0, 3.0, 1.5]
    finish(row, tmp_path / "row.json")
    assert f"2 (1.5 to 3), wanted {sense} 1.9: {verdict}" in capsys.readouterr().out
    assert json.loads((tmp_path / "row.json").read_text())["sides"] == sides
