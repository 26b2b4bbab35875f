"""Claims about the report: it stands alone, shows what was logged, and runs nothing that a model wrote."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import TrackingSection
from rlsys.report import (
    HEIGHT,
    MAX_BARS,
    WIDTH,
    ChartSpec,
    chart,
    headline,
    nice_ticks,
    number,
    series,
    tick_labels,
    write_report,
)
from rlsys.tracking import RolloutRow, Tracker

VOID = {"meta", "br", "line", "path", "rect", "circle"}
ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"


class Page(HTMLParser):
    """Counts elements, keeps attributes and visible text, and fails on elements that are closed wrongly."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def run_of(folder: Path, text: str = " 2", name: str = "seen") -> Tracker:
    with Tracker(folder, TrackingSection(wandb="disabled"), name, {"run": {"name": name}}, note=str) as tracker:
        tracker.log(10, {"sft/loss": 2.0})
        tracker.log(0, {"eval/accuracy": 0.455, "time/eval_s": 2.0})
        tracker.rollouts(0, [RolloutRow(0, "before", "1 + 1 =", text, "2", 0.0, None, 4, "length")])
        for step in (1, 2, 3):
            tracker.log(step, {"reward/mean": step / 4, "time/sample_s": 2.0, "time/learn_s": 1.0, "time/step_s": 3.0})
            tracker.rollouts(step, [RolloutRow(step, "train", "2 + 2 =", text, "4", 0.0, -0.25, 4, "stop")])
        tracker.log(3, {"eval/accuracy": 0.93})
        tracker.rollouts(3, [RolloutRow(3, "after", "1 + 1 =", " after", "2", 1.0, None, 4, "stop")])
    return tracker


def test_the_headline_is_the_accuracy_before_and_after(tmp_path: Path) -> None:
    run_of(tmp_path)
    page = Page(write_report(tmp_path))
    assert re.search(r"45\.5 %\s*→\s*93\.0 %\s*\+47\.5 points", page.text)
    assert "seen" in page.text


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    run_of(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.count("link") == page.count("img") == page.count("iframe") == 0
    assert not [attrs for _, attrs in page.elements if {"src", "href", "action", "data"} & set(attrs)]
    assert "url(" not in page.source and "@import" not in page.source and "http" not in page.text
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


@pytest.mark.parametrize("where", ["completion", "name"])
def test_what_a_model_or_a_user_wrote_is_text_and_never_markup(tmp_path: Path, where: str) -> None:
    run_of(tmp_path, **({"text": ATTACK} if where == "completion" else {"name": ATTACK}))
    page = Page(write_report(tmp_path))
    assert page.count("script") == 1 and page.count("img") == 0
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert page.text.count(ATTACK) >= 1, "it is readable as it was written"


def test_the_policy_lets_exactly_our_script_run(tmp_path: Path) -> None:
    import base64
    import hashlib

    run_of(tmp_path)
    page = write_report(tmp_path).read_text("utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page


def test_rollouts_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    run_of(tmp_path, text=" wrong")
    page = Page(write_report(tmp_path))
    assert page.count("article") == 1
    article = page.source[page.source.index("<article") : page.source.index("</article>")]
    assert re.search(r"1 \+ 1 =.*before.*reward 0.* wrong.*after.*reward 1.* after", article, re.DOTALL)


def test_a_run_that_wrote_nothing_has_a_report(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "not evaluated yet" in page.text
    assert page.count("svg") == 0


def test_one_point_and_no_finite_point_have_a_report(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingSection(wandb="disabled"), "r", {}, note=str) as tracker:
        tracker.log(0, {"eval/accuracy": 0.5})
        tracker.log(1, {"policy/ratio_max": math.inf, "policy/grad_norm": math.nan, "time/learn_s": 0.0})
    page = Page(write_report(tmp_path))
    assert page.count("svg") == 4
    assert "max: not finite at step 1" in page.text
    assert "nan" not in "".join(str(attrs) for _, attrs in page.elements).lower()


def test_half_a_surrogate_pair_does_not_cost_the_report(tmp_path: Path) -> None:
    run_of(tmp_path, text=" \ud83d")
    assert write_report(tmp_path).is_file()


def line(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "time": 0.0, "stage": "rl", **{name.replace("_", "/", 1): v for name, v in values.items()}}


ONE = ChartSpec("t", {"a/x": "x"})
STACK = ChartSpec("t", {"a/x": "x", "a/y": "y"}, stacked=True, low=0)


def test_a_later_value_of_a_step_replaces_the_earlier_and_steps_are_in_order() -> None:
    records = [line(2, a_x=1.0), line(1, a_x=5.0), line(2, a_x=3.0), line(3, a_y=1.0)]
    assert series(records, "a/x") == [(1, 5.0), (2, 3.0)]


def test_a_curve_lies_within_its_drawing_and_higher_values_are_drawn_higher() -> None:
    drawn = chart(ONE, [line(step, a_x=value) for step, value in enumerate([0.37, -2.0, 11.0, 4.0])])
    assert drawn is not None
    (curve,) = drawn.curves
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in curve.dots)
    assert [x for x, _ in curve.dots] == sorted(x for x, _ in curve.dots)
    heights = [y for _, y in curve.dots]
    assert sorted(range(4), key=lambda i: -heights[i]) == [1, 0, 3, 2]


def test_a_curve_breaks_at_a_value_that_is_no_number() -> None:
    drawn = chart(ONE, [line(step, a_x=value) for step, value in enumerate([1.0, 2.0, math.nan, 4.0, 3.0])])
    assert drawn is not None
    assert drawn.curves[0].path.count("M") == 2
    assert drawn.curves[0].not_finite == [2]


def test_stacked_bars_stand_on_each_other_and_reach_their_sum() -> None:
    drawn = chart(STACK, [line(1, a_x=2.0, a_y=4.0), line(2, a_x=1.0, a_y=3.0)])
    assert drawn is not None
    lower, upper = (curve.bars[0] for curve in drawn.curves)
    assert upper[1] + upper[3] == pytest.approx(lower[1], abs=0.02)
    assert upper[3] / lower[3] == pytest.approx(2.0, rel=0.01)
    at_six = next(tick.at for tick in drawn.y_ticks if float(tick.label) == 6)
    assert upper[1] == pytest.approx(at_six, abs=0.02), "2 + 4 reaches the mark 6"


def test_many_steps_share_bars_that_show_their_mean() -> None:
    drawn = chart(STACK, [line(step, a_x=float(step % 2), a_y=1.0) for step in range(1000)])
    assert drawn is not None
    assert len(drawn.curves[0].bars) == MAX_BARS
    assert drawn.curves[0].bars[0][3] / drawn.curves[1].bars[0][3] == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 2e-7), (0.9993, 1.0021), (12, 48), (5, 5), (0, 0)])
def test_marks_enclose_the_values_and_their_labels_differ(low: float, high: float) -> None:
    marks = nice_ticks(low, high)
    assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12
    assert 2 <= len(marks) <= 8
    assert len(set(tick_labels(marks))) == len(marks)


def test_numbers_are_short_and_ratios_near_one_stay_visible() -> None:
    shown = [number(value) for value in (0.0, 0.01234, 1.5e-7, 12.0, 1830.4, 1.00042, math.inf)]
    assert shown == ["0", "0.0123", "1.5e-7", "12", "1830", "1.00042", "not finite"]


def test_one_evaluation_is_no_improvement() -> None:
    found = headline([line(0, eval_accuracy=0.5)])
    assert found is not None
    assert (found["before"], found["after"]) == ("50.0 %", "")
