"""Charts of the report as plain numbers: which metrics share a chart, and the coordinates of points, bands, bars."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlsys.report.numbers import Scale, nice_ticks, number, tick_labels
from rlsys.run_state.jsonl import Record

Points = list[tuple[int, float]]  # (step, value), by step
Bar = tuple[float, float, float, float]  # x, y, width, height

WIDTH, HEIGHT = 360, 176  # of a chart in SVG units, about pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 24  # margins inside the chart
COLOURS = 8
MAX_DOTS = 80  # a line with more points is drawn without dots
MAX_POINTS = 600  # per line; of a longer one the lowest and the highest value of neighbouring points are kept
MAX_BARS = 100  # with more steps, neighbouring steps share a bar that shows their mean


@dataclass(frozen=True, slots=True)
class ChartSpec:
    """Metrics of one chart and their labels. `pattern`: regular expression for further metrics, named by its group."""

    title: str
    lines: Mapping[str, str] = field(default_factory=dict)  # metric -> label
    unit: str = ""
    x_label: str = "step"
    stacked: bool = False
    low: float | None = None  # the y axis includes `low` and `high`
    high: float | None = None
    pattern: str = ""  # of further metrics
    label: str = "{}"  # label of these metrics; {}: the group of `pattern`
    no_share: str = ""  # title if values are outside of [0, 1], such as a user's rewards
    interval: bool = False  # draw a band between the metrics `x_low` and `x_high` of a line `x`, if logged


TIMES = {
    f"time/{stage}_s": label
    for stage, label in {
        "sample": "sample",
        "grade": "grade",
        "reference": "reference",
        "advantage": "advantages",
        "learn": "learn",
        "sync": "sync",
        "eval": "evaluate",
        "waiting": "waiting (overlap)",
    }.items()
}
# fmt: off
SECTIONS: Mapping[str, Sequence[ChartSpec]] = {
    "Overview": (
        ChartSpec("Held-out accuracy", {"eval/accuracy": "greedy"}, low=0, high=1, interval=True,
                  no_share="Held-out reward"),
        ChartSpec("Held-out pass@k", pattern=r"eval/pass_at_(\d+)", label="pass@{}", low=0, high=1, interval=True),
        ChartSpec("Reward", {"reward/mean": "mean", "reward/std": "standard deviation"}, low=0, high=1),
        ChartSpec("Reward terms", {"reward/correct": "correct", "reward/format": "format", "reward/length": "length",
                                   "reward/overlong": "overlong"}),
        ChartSpec("Groups", {"reward/groups": "all", "reward/agreeing_groups": "zero variance"}, low=0),
        ChartSpec("Time per stage", TIMES, unit="s", stacked=True, low=0),
    ),
    "Policy": (
        ChartSpec("Ratio p / q", {"policy/ratio_mean": "mean", "policy/ratio_max": "max"}),
        ChartSpec("KL divergence", {"policy/kl_k1": "k1, to sampler", "policy/kl_k3": "k3, to sampler",
                                    "policy/kl_reference": "to the reference"}, unit="nats"),
        ChartSpec("Learner against sampler", {"policy/logprob_diff_mean": "mean |p − q|",  # noqa: RUF001
                                              "policy/logprob_diff_max": "max |p − q|"}, unit="nats", low=0),  # noqa: RUF001
        ChartSpec("Clipped tokens", {"policy/clip_fraction": "by the loss",
                                     "policy/capped_share": "by the importance cap"}, unit="share", low=0),
        ChartSpec("Policy lag of tokens", {"policy/lag_mean": "mean", "policy/lag_max": "max"}, unit="versions", low=0),
        ChartSpec("Gradient norm", {"policy/grad_norm": "before clipping"}, low=0),
        ChartSpec("Learning rate", {"policy/learning_rate": "rate"}, low=0),
    ),
    "Sampling": (
        ChartSpec("Throughput", {"sampler/tokens_per_s": "sampler"}, unit="tokens/s", low=0),
        ChartSpec("Completion length", {"sampler/completion_tokens_mean": "sampled",
                                        "eval/mean_tokens": "greedy, held out"}, unit="tokens", low=0),
        ChartSpec("Truncated at max_tokens", {"sampler/truncated_share": "completions"}, unit="share", low=0),
        ChartSpec("Turns", {"sampler/turns_mean": "mean per completion"}, low=0),
        ChartSpec("Failed replies", {"sampler/reply_timeouts": "timeouts", "sampler/reply_errors": "errors"},
                  low=0),
        ChartSpec("Dynamic sampling rounds", {"sampler/refill_rounds": "rounds"}, low=0),
    ),
    "System": (
        ChartSpec("Memory", {"system/memory_gb": "node"}, unit="GiB", low=0,
                  pattern=r"system/(?!gpu\d)(\w+)_memory_gb"),
        ChartSpec("CPU utilization", {"system/cpu_percent": "node"}, unit="%", low=0, high=100),
        ChartSpec("Free disk space", {"system/disk_free_gb": "run directory"}, unit="GiB", low=0),
        ChartSpec("GPU memory", pattern=r"system/(gpu\d+)_memory_gb", unit="GiB", low=0),
        ChartSpec("GPU utilization", pattern=r"system/(gpu\d+)_percent", unit="%", low=0, high=100),
    ),
    "Supervised stage": (
        ChartSpec("Supervised loss", {"sft/loss": "loss"}, unit="nats", x_label="supervised step", low=0),
        ChartSpec("Supervised gate", {"sft/gate_accuracy": "accuracy"}, x_label="supervised step", low=0, high=1),
    ),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    label: str
    colour: int  # index of the palette
    path: str  # SVG, empty for bars
    band: str  # SVG path of the confidence band, empty without one
    dots: Sequence[tuple[float, float]]
    bars: Sequence[Bar]
    last: str
    not_finite: Sequence[int]  # steps whose value is not finite


@dataclass(frozen=True, slots=True)
class Chart:
    spec: ChartSpec
    curves: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    hover: str  # JSON for the page's script: [[x, "step 3", ["0.5", ...]], ...]
    summary: str  # text for screen readers


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    points: Points
    low: Points  # lower end of the interval; empty without one
    high: Points


def series(records: Sequence[Record], metric: str) -> Points:
    """The values of a metric by step; of several values for one step the last."""
    values = {record["step"]: record[metric] for record in records if metric in record}
    return sorted(values.items())


def lines_of(spec: ChartSpec, records: Sequence[Record]) -> list[Line]:
    """The logged lines of a spec; metrics of a pattern are sorted by the numbers in their names."""
    names = dict(spec.lines)
    if spec.pattern:
        logged = {name for record in records for name in record}
        found = {name: match[1] for name in logged if (match := re.fullmatch(spec.pattern, name))}
        names |= {name: spec.label.format(found[name]) for name in sorted(found, key=_natural)}
    lines = []
    for metric, label in names.items():
        if points := series(records, metric):
            low, high = (series(records, f"{metric}_{end}") if spec.interval else [] for end in ("low", "high"))
            lines.append(Line(label, points, low, high))
    return lines


def chart(spec: ChartSpec, records: Sequence[Record]) -> Chart | None:
    """The chart of a spec; None if none of its metrics was logged."""
    lines = lines_of(spec, records)
    if not lines:
        return None
    lines = _shared_bars(lines) if spec.stacked else [_thinned(line) for line in lines]
    steps = sorted({step for line in lines for step, _ in line.points})
    every = [points for line in lines for points in (line.points, line.low, line.high)]
    values = [value for points in every for _, value in points if math.isfinite(value)]
    if (spec.low, spec.high) == (0, 1) and values and not (min(values) >= 0 and max(values) <= 1):
        spec = replace(spec, low=None, high=None)
        if not all(0 <= value <= 1 for line in lines for _, value in line.points if math.isfinite(value)):
            spec = replace(spec, title=spec.no_share or spec.title)
    if spec.stacked:
        values += _totals(lines).values()
    values += [bound for bound in (spec.low, spec.high) if bound is not None]
    lowest, highest = min(values, default=0.0), max(values, default=1.0)
    y_marks = nice_ticks(lowest, lowest + 1 if lowest == highest == spec.low else highest)
    half = smallest_gap(steps) / 2 if spec.stacked else 0.0  # room for the outer bars
    x = Scale(steps[0] - half, steps[-1] + half, LEFT, WIDTH - RIGHT)
    y = Scale(y_marks[0], y_marks[-1], HEIGHT - BOTTOM, TOP)
    draw = _bars if spec.stacked else _curves
    return Chart(
        spec,
        draw(spec, lines, x, y),
        [Tick(x(mark), f"{mark:.0f}") for mark in nice_ticks(steps[0], steps[-1], 5, whole=True) if x.holds(mark)],
        [Tick(y(mark), label) for mark, label in zip(y_marks, tick_labels(y_marks), strict=True)],
        _hover(spec, lines, steps, x),
        "; ".join(f"{line.label} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in lines),
    )


def _hover(spec: ChartSpec, lines: Sequence[Line], steps: Sequence[int], x: Scale) -> str:
    by_line = [(dict(line.points), dict(line.low), dict(line.high)) for line in lines]

    def said(step: int) -> list[str]:
        texts = []
        for values, low, high in by_line:
            text = _said(spec, values[step]) if step in values else ""
            if text and step in low and step in high:
                text += f" ({_said(spec, low[step])} to {_said(spec, high[step])})"
            texts.append(text)
        return texts

    points = [[round(x(step), 1), f"{spec.x_label} {step}", said(step)] for step in steps]
    return json.dumps(points, separators=(",", ":"))


def _said(spec: ChartSpec, value: float) -> str:
    """Format a value; shares (axis from 0 to 1) with three decimals."""
    return number(round(value, 3) if spec.high == 1 and math.isfinite(value) else value)


def _curves(spec: ChartSpec, lines: Sequence[Line], x: Scale, y: Scale) -> list[Curve]:
    found = []
    for colour, line in enumerate(lines):
        pen, path, dots = "M", [], []
        for step, value in line.points:
            if not math.isfinite(value):
                pen = "M"  # a value that is not finite interrupts the line
                continue
            at = (round(x(step), 1), round(y(value), 1))
            path.append(f"{pen}{at[0]} {at[1]}")
            dots.append(at)
            pen = "L"
        shown_dots = dots if len(dots) <= MAX_DOTS else []
        found.append(_curve(spec, line, colour, "".join(path), _band(line, x, y), shown_dots, []))
    return found


def _band(line: Line, x: Scale, y: Scale) -> str:
    """SVG path along the upper end of the interval and back along the lower end."""
    high = dict(line.high)
    both = [(step, low, high[step]) for step, low in line.low if step in high]
    both = [ends for ends in both if all(map(math.isfinite, ends))]
    if len(both) < 2:
        return ""
    outline = [(step, top) for step, _, top in both] + [(step, low) for step, low, _ in reversed(both)]
    return "M" + "L".join(f"{round(x(step), 1)} {round(y(value), 1)}" for step, value in outline) + "Z"


def _bars(spec: ChartSpec, lines: Sequence[Line], x: Scale, y: Scale) -> list[Curve]:
    steps = sorted({step for line in lines for step, _ in line.points})
    width = 0.8 * (x(smallest_gap(steps)) - x(0)) if x.high > x.low else 40.0
    floor = dict.fromkeys(steps, 0.0)
    found = []
    for colour, line in enumerate(lines):
        bars = []
        for step, value in line.points:
            if math.isfinite(value):
                bottom, floor[step] = y(floor[step]), floor[step] + value
                top = y(floor[step])
                bars.append((round(x(step) - width / 2, 2), round(top, 2), round(width, 2), round(bottom - top, 2)))
        found.append(_curve(spec, line, colour, "", "", [], bars))
    return found


def _curve(
    spec: ChartSpec,
    line: Line,
    colour: int,
    path: str,
    band: str,
    dots: Sequence[tuple[float, float]],
    bars: Sequence[Bar],
) -> Curve:
    not_finite = [step for step, value in line.points if not math.isfinite(value)]
    return Curve(line.label, colour % COLOURS, path, band, dots, bars, _said(spec, line.points[-1][1]), not_finite)


def smallest_gap(steps: Sequence[int]) -> int:
    return min((b - a for a, b in itertools.pairwise(steps)), default=1)


def _totals(lines: Sequence[Line]) -> dict[int, float]:
    totals: dict[int, float] = {}
    for line in lines:
        for step, value in line.points:
            totals[step] = totals.get(step, 0.0) + (value if math.isfinite(value) else 0.0)
    return totals


def _thinned(line: Line) -> Line:
    """The line with at most MAX_POINTS points. Logged values are kept, not averaged, so that spikes remain visible."""
    if len(line.points) <= MAX_POINTS:
        return line
    size = math.ceil(2 * len(line.points) / MAX_POINTS)
    kept: list[tuple[int, float]] = []
    for at in range(0, len(line.points), size):
        some = line.points[at : at + size]
        odd = [point for point in some if not math.isfinite(point[1])]
        finite = [point for point in some if math.isfinite(point[1])] or odd[:1]
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
        kept += sorted(ends | set(odd[:1]))
    steps = {step for step, _ in kept}
    low, high = ([point for point in points if point[0] in steps] for points in (line.low, line.high))
    return Line(line.label, kept, low, high)


def _shared_bars(lines: Sequence[Line]) -> list[Line]:
    """Lines with at most MAX_BARS steps: neighbouring steps are merged into the first one, with the mean value."""
    steps = sorted({step for line in lines for step, _ in line.points})
    share = math.ceil(len(steps) / MAX_BARS)
    home = {step: steps[i - i % share] for i, step in enumerate(steps)}
    sizes: dict[int, int] = {}
    for step in steps:
        sizes[home[step]] = sizes.get(home[step], 0) + 1
    shared = []
    for line in lines:
        sums: dict[int, float] = {}
        for step, value in line.points:
            sums[home[step]] = sums.get(home[step], 0.0) + value
        shared.append(Line(line.label, [(step, total / sizes[step]) for step, total in sums.items()], [], []))
    return shared


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by the numbers in a name: ``pass_at_2`` before ``pass_at_10``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
