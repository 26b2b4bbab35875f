"""Claims about the curves of a report: they show what was logged, to scale."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rlsys.report.charts import HEIGHT, MAX_BARS, MAX_POINTS, WIDTH, ChartSpec, chart, lines_of, series
from rlsys.report.numbers import nice_ticks, number, tick_labels


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


def test_a_band_encloses_its_line_and_is_there_only_with_both_ends() -> None:
    spec = ChartSpec("t", {"a/x": "x", "a/y": "y"}, interval=True)
    drawn = chart(spec, [line(step, a_x=0.5, a_x_low=0.25, a_x_high=0.75, a_y=0.5, a_y_low=0.0) for step in (1, 2)])
    assert drawn is not None
    x, y = drawn.curves
    heights = {float(point.split()[1]) for point in x.band.strip("MZ").split("L")}
    assert min(heights) < x.dots[0][1] < max(heights)
    assert y.band == ""
    assert json.loads(drawn.hover)[0][2] == ["0.5 (0.25 to 0.75)", "0.5"]


def test_metrics_of_a_pattern_are_found_in_the_order_of_their_numbers() -> None:
    spec = ChartSpec("t", pattern=r"eval/pass_at_(\d+)", label="pass@{}", interval=True)
    records = [line(0, eval_pass_at_10=0.5, eval_pass_at_2=0.25, eval_pass_at_10_low=0.1, eval_pass_at_10_high=0.9)]
    found = lines_of(spec, records)
    assert [one.label for one in found] == ["pass@2", "pass@10"]
    assert (found[1].low, found[0].low) == ([(0, 0.1)], [])


def test_a_long_line_keeps_its_spikes_and_shows_nothing_that_was_not_logged() -> None:
    values = [float(step % 3) for step in range(20_000)]
    values[12_345], values[777] = 99.0, math.nan
    drawn = chart(ONE, [line(step, a_x=value) for step, value in enumerate(values)])
    assert drawn is not None
    hover = json.loads(drawn.hover)
    assert len(hover) <= 1.5 * MAX_POINTS
    assert [text for _, step, text in hover if step == "step 12345"] == [["99"]]
    assert all(text == [number(values[int(step.split()[1])])] for _, step, text in hover)
    assert drawn.curves[0].not_finite == [777]


def test_a_line_that_stays_at_zero_lies_on_the_floor() -> None:
    drawn = chart(ChartSpec("t", {"a/x": "x"}, low=0), [line(step, a_x=0.0) for step in range(3)])
    assert drawn is not None
    assert drawn.y_ticks[0].label == "0.0" and drawn.curves[0].dots[0][1] == drawn.y_ticks[0].at
