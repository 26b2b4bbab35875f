"""Facts of a run on a GPU are on the disk when they are known, and its parts end in time."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu_journal import (
    CUT_OFF,
    DONE,
    FACTS,
    FAILED,
    LEFT_OUT,
    Journal,
    Notes,
    Part,
    Parts,
    new_journal,
    process_began,
    read_facts,
    within,
)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return new_journal(tmp_path / "out", time.time())


def outcomes(journal: Journal) -> dict[str, str]:
    return {fact["part"]: fact["value"] for fact in read_facts(journal.folder) if fact["fact"] == "part"}


def test_a_fact_is_in_the_file_and_on_the_terminal_at_once(
    journal: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.fact("sync", "seconds", 0.25, "s", version=3)
    (fact,) = read_facts(journal.folder)
    assert (fact["part"], fact["fact"], fact["value"], fact["unit"], fact["version"]) == (
        "sync",
        "seconds",
        0.25,
        "s",
        3,
    )
    assert "sync: seconds: 0.25 s" in capsys.readouterr().out


def test_a_new_run_removes_the_facts_of_an_earlier_one(journal: Journal) -> None:
    journal.fact("a", "b", 1)
    assert read_facts(new_journal(journal.folder, 0.0).folder) == []


def test_a_line_torn_by_a_kill_is_left_out_and_the_others_are_read(journal: Journal) -> None:
    journal.fact("a", "whole", 1)
    with journal.path.open("a") as file:
        file.write('{"s": 1.0, "part": "a", "fa')
    assert [fact["fact"] for fact in read_facts(journal.folder)] == ["whole"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_a_string_as_json_has_none(journal: Journal, value: float) -> None:
    journal.fact("a", "b", value)
    (line,) = (journal.folder / FACTS).read_text().splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(line, parse_constant=refuse)["value"] == str(value)


@pytest.mark.parametrize(
    ("value", "bound", "sense", "passed"),
    [(1.0, 1.0, "<=", True), (1.1, 1.0, "<=", False), (0.9, 1.0, ">=", False), (math.nan, 1.0, "<=", False)],
)
def test_a_check_is_told_with_its_bound_and_remembered_where_it_fails(
    journal: Journal, value: float, bound: float, sense: str, passed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = Notes(journal, "part")
    notes.check("claim", value, bound, sense)
    (fact,) = read_facts(journal.folder)
    assert (fact["passed"], fact["bound"]) == (passed, bound)
    assert notes.failed == ([] if passed else ["claim"])
    assert capsys.readouterr().out.startswith("PASS" if passed else "FAIL")


def test_parts_run_in_order_and_one_that_no_longer_fits_is_left_out_by_name(journal: Journal) -> None:
    order: list[str] = []

    def work(name: str, outcome: str) -> Part:
        return Part(name, 5.0, 60.0, lambda limit: order.append(name) or outcome)  # type: ignore[func-returns-value]

    parts = Parts(journal, time.time() + 30)
    parts.run([work("first", DONE), Part("long", 1000.0, 2000.0, lambda limit: DONE), work("last", FAILED)])
    assert order == ["first", "last"]
    assert outcomes(journal) == {"first": DONE, "long": LEFT_OUT, "last": FAILED} == parts.outcomes
    assert parts.summary() == {DONE: ["first"], FAILED: ["last"], CUT_OFF: [], LEFT_OUT: ["long"]}


def test_a_part_may_take_no_longer_than_what_is_left_of_the_total(journal: Journal) -> None:
    allowed: list[float] = []
    parts = Parts(journal, time.time() + 20)
    parts.run([Part(f"limit {limit}", 0.0, limit, lambda s: allowed.append(s) or DONE) for limit in (5.0, 1000.0)])  # type: ignore[func-returns-value]
    assert allowed[0] == 5.0 and 15 < allowed[1] <= 20


def test_work_that_takes_longer_than_its_limit_is_cut_off_even_where_it_swallows_errors() -> None:
    def stubborn() -> str:
        while True:
            try:
                time.sleep(60)
            except Exception:  # as library code may do: the cut has to get past it
                continue

    began = time.monotonic()
    assert within(0.2, stubborn) == CUT_OFF
    assert time.monotonic() - began < 30


def test_work_that_ends_in_time_is_not_disturbed_afterwards() -> None:
    assert within(0.3, lambda: FAILED) == FAILED
    time.sleep(0.5)


def test_the_time_of_a_run_counts_from_the_start_of_its_process() -> None:
    import psutil

    assert abs(process_began() - psutil.Process(os.getpid()).create_time()) < 2
