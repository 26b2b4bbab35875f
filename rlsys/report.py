"""A run as one HTML page that needs nothing else: no network, no other file, no library in the browser.

The geometry of every curve is computed here, as plain numbers; templates/report.html.j2 only draws. Everything that a
model wrote is text to the template, which escapes it, and the page's own policy lets no script run but ours.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlsys.progress import duration
from rlsys.tracking import CONFIG, ENVIRONMENT, RolloutRow, read_metrics, read_rollouts

Points = list[tuple[int, float]]  # (step, value), by step
Record = Mapping[str, Any]  # a line of metrics.jsonl

WIDTH, HEIGHT = 480, 210  # of a drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 24  # margins within it
MAX_DOTS = 80  # more points than this are drawn as a line only
MAX_BARS = 100  # more steps than this share a bar, which shows their mean
MAX_TRAIN_ROWS = 200  # of the rollouts during training


@dataclass(frozen=True, slots=True)
class ChartSpec:
    """Which metrics share a drawing, under which short names."""

    title: str
    lines: Mapping[str, str]  # metric -> label
    unit: str = ""
    x_label: str = "step"
    stacked: bool = False
    low: float | None = None  # the axis reaches at least to these
    high: float | None = None


CHARTS = (
    ChartSpec("Held-out accuracy", {"eval/accuracy": "greedy"}, low=0, high=1),
    ChartSpec("Reward", {"reward/mean": "mean", "reward/std": "standard deviation"}, low=0, high=1),
    ChartSpec("Ratio p / q", {"policy/ratio_mean": "mean", "policy/ratio_max": "max"}),
    ChartSpec(
        "KL divergence",
        {"policy/kl_k1": "k1, to sampler", "policy/kl_k3": "k3, to sampler", "policy/kl_reference": "to the base"},
        unit="nats",
    ),
    ChartSpec(
        "Learner against sampler",
        {"policy/logprob_diff_mean": "mean |p − q|", "policy/logprob_diff_max": "max |p − q|"},  # noqa: RUF001
        unit="nats",
        low=0,
    ),
    ChartSpec(
        "Completion length",
        {"sampler/completion_tokens_mean": "sampled", "eval/mean_tokens": "greedy, held out"},
        unit="tokens",
        low=0,
    ),
    ChartSpec("Groups", {"reward/groups": "all", "reward/agreeing_groups": "agreeing, teach nothing"}, low=0),
    ChartSpec("Gradient norm", {"policy/grad_norm": "before clipping"}, low=0),
    ChartSpec(
        "Time per stage",
        {
            f"time/{stage}_s": label
            for stage, label in {
                "sample": "sample",
                "grade": "grade",
                "reference": "reference",
                "advantage": "advantages",
                "learn": "learn",
                "sync": "sync",
                "eval": "evaluate",
            }.items()
        },
        unit="s",
        stacked=True,
        low=0,
    ),
    ChartSpec("Throughput", {"sampler/tokens_per_s": "sampler"}, unit="tokens/s", low=0),
    ChartSpec("Supervised loss", {"sft/loss": "loss"}, unit="nats", x_label="supervised step", low=0),
    ChartSpec("Supervised gate", {"sft/gate_accuracy": "accuracy"}, x_label="supervised step", low=0, high=1),
)


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    label: str
    colour: int  # index of the palette
    path: str  # SVG, empty for bars
    dots: Sequence[tuple[float, float]]
    bars: Sequence[tuple[float, float, float, float]]  # x, y, width, height
    last: str
    not_finite: Sequence[int]  # steps whose value is no number


@dataclass(frozen=True, slots=True)
class Chart:
    spec: ChartSpec
    curves: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    hover: str  # JSON for the page's script: [[x, "step 3", ["0.5", ...]], ...]
    summary: str  # for those who hear the page


@dataclass(frozen=True, slots=True)
class Pair:
    """One held-out problem, answered before and after."""

    prompt: str
    answer: str
    before: RolloutRow | None
    after: RolloutRow | None


def write_report(run_dir: Path) -> Path:
    """Write report.html from what the run has written down so far; any part may be missing or empty."""
    records = read_metrics(run_dir)
    rows = read_rollouts(run_dir)
    config_text = _text(run_dir / CONFIG)
    config = yaml.safe_load(config_text) or {}
    charts = [(spec, chart(spec, records)) for spec in CHARTS]
    train_rows = [row for row in rows if row.phase == "train"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.globals["script_hash"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    page = environment.get_template("report.html.j2").render(
        name=config.get("run", {}).get("name", run_dir.name),
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        headline=headline(records),
        tiles=tiles(records),
        charts=[drawn for _, drawn in charts if drawn],
        missing=[spec.title for spec, drawn in charts if not drawn],
        size={"w": WIDTH, "h": HEIGHT, "l": LEFT, "r": WIDTH - RIGHT, "t": TOP, "b": HEIGHT - BOTTOM},
        pairs=pairs(rows),
        train_steps=by_step(train_rows[-MAX_TRAIN_ROWS:]),
        train_left_out=max(0, len(train_rows) - MAX_TRAIN_ROWS),
        config=config_text,
        environment=json.loads(_text(run_dir / ENVIRONMENT) or "{}"),
    )
    path = run_dir / "report.html"
    path.write_text(page, "utf-8", errors="replace")  # a model can write half of a surrogate pair
    return path


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def series(records: Sequence[Record], metric: str) -> Points:
    """The values of a metric by step; of two values for one step the later counts."""
    values = {record["step"]: record[metric] for record in records if metric in record}
    return sorted(values.items())


def headline(records: Sequence[Record]) -> dict[str, str] | None:
    """Accuracy at the first and the last evaluation; None before there is one."""
    accuracy = series(records, "eval/accuracy")
    if not accuracy:
        return None
    (first_step, before), (last_step, after) = accuracy[0], accuracy[-1]
    return {
        "before": percent(before),
        "after": percent(after) if len(accuracy) > 1 else "",
        "gain": f"{(after - before) * 100:+.1f} points",
        "verdict": "good" if after > before else "bad" if after < before else "part",
        "steps": f"steps {first_step} to {last_step}",
    }


def tiles(records: Sequence[Record]) -> list[tuple[str, str]]:
    """A few figures of the whole run: (what, value)."""
    found = []
    reward = series(records, "reward/mean")
    if reward:
        found.append(("RL steps", str(reward[-1][0])))
        found.append(("mean reward, first to last", f"{number(reward[0][1])} → {number(reward[-1][1])}"))
    if records:
        found.append(("time, first to last figure", duration(records[-1]["time"] - records[0]["time"])))
    step_s = [value for _, value in series(records, "time/step_s")]
    if step_s:
        found.append(("per step", f"{number(sum(step_s) / len(step_s))} s"))
    difference = [value for _, value in series(records, "policy/logprob_diff_mean")]
    if difference:
        found.append(("worst mean |p − q|", f"{number(max(difference))} nats"))  # noqa: RUF001
    return found


def pairs(rows: Sequence[RolloutRow]) -> list[Pair]:
    """Rollouts of the evaluations before and after, matched by prompt and answer, in the order written."""
    before = {(row.prompt, row.answer): row for row in rows if row.phase == "before"}
    after = {(row.prompt, row.answer): row for row in rows if row.phase == "after"}
    return [Pair(*key, before.get(key), after.get(key)) for key in {**before, **after}]


def by_step(rows: Sequence[RolloutRow]) -> dict[int, list[RolloutRow]]:
    found: dict[int, list[RolloutRow]] = {}
    for row in rows:
        found.setdefault(row.step, []).append(row)
    return found


def chart(spec: ChartSpec, records: Sequence[Record]) -> Chart | None:
    """The drawing of a spec, or None where none of its metrics was logged."""
    lines = [(label, found) for metric, label in spec.lines.items() if (found := series(records, metric))]
    if not lines:
        return None
    if spec.stacked:
        lines = _thinned(lines)
    steps = sorted({step for _, points in lines for step, _ in points})
    values = [value for _, points in lines for _, value in points if math.isfinite(value)]
    if spec.stacked:
        values += _totals(lines).values()
    values += [bound for bound in (spec.low, spec.high) if bound is not None]
    y_marks = nice_ticks(min(values, default=0.0), max(values, default=1.0))
    half = smallest_gap(steps) / 2 if spec.stacked else 0.0  # room for the outer bars
    x = Scale(steps[0] - half, steps[-1] + half, LEFT, WIDTH - RIGHT)
    y = Scale(y_marks[0], y_marks[-1], HEIGHT - BOTTOM, TOP)
    draw = _bars if spec.stacked else _curves
    by_label = [dict(points) for _, points in lines]
    hover = [
        [round(x(step), 1), f"{spec.x_label} {step}", [number(v[step]) if step in v else "" for v in by_label]]
        for step in steps
    ]
    return Chart(
        spec,
        draw(lines, x, y),
        [Tick(x(mark), f"{mark:.0f}") for mark in nice_ticks(steps[0], steps[-1], 5, whole=True) if x.holds(mark)],
        [Tick(y(mark), label) for mark, label in zip(y_marks, tick_labels(y_marks), strict=True)],
        json.dumps(hover, separators=(",", ":")),
        "; ".join(f"{label} from {number(points[0][1])} to {number(points[-1][1])}" for label, points in lines),
    )


def _curves(lines: Sequence[tuple[str, Points]], x: Scale, y: Scale) -> list[Curve]:
    found = []
    for colour, (label, points) in enumerate(lines):
        pen, path, dots = "M", [], []
        for step, value in points:
            if not math.isfinite(value):
                pen = "M"  # the line breaks where there is no number
                continue
            at = (round(x(step), 1), round(y(value), 1))
            path.append(f"{pen}{at[0]} {at[1]}")
            dots.append(at)
            pen = "L"
        not_finite = [step for step, value in points if not math.isfinite(value)]
        shown_dots = dots if len(dots) <= MAX_DOTS else []
        found.append(Curve(label, colour, "".join(path), shown_dots, [], number(points[-1][1]), not_finite))
    return found


def _bars(lines: Sequence[tuple[str, Points]], x: Scale, y: Scale) -> list[Curve]:
    steps = sorted({step for _, points in lines for step, _ in points})
    width = 0.8 * (x(smallest_gap(steps)) - x(0)) if x.high > x.low else 40.0
    floor = dict.fromkeys(steps, 0.0)
    found = []
    for colour, (label, points) in enumerate(lines):
        bars = []
        for step, value in points:
            if math.isfinite(value):
                bottom, floor[step] = y(floor[step]), floor[step] + value
                top = y(floor[step])
                bars.append((round(x(step) - width / 2, 2), round(top, 2), round(width, 2), round(bottom - top, 2)))
        not_finite = [step for step, value in points if not math.isfinite(value)]
        found.append(Curve(label, colour, "", [], bars, number(points[-1][1]), not_finite))
    return found


def smallest_gap(steps: Sequence[int]) -> int:
    return min((b - a for a, b in itertools.pairwise(steps)), default=1)


def _totals(lines: Sequence[tuple[str, Points]]) -> dict[int, float]:
    totals: dict[int, float] = {}
    for _, points in lines:
        for step, value in points:
            totals[step] = totals.get(step, 0.0) + (value if math.isfinite(value) else 0.0)
    return totals


def _thinned(lines: Sequence[tuple[str, Points]]) -> list[tuple[str, Points]]:
    """At most MAX_BARS steps: neighbouring steps give way to the first of them, with the mean of their values."""
    steps = sorted({step for _, points in lines for step, _ in points})
    share = math.ceil(len(steps) / MAX_BARS)
    home = {step: steps[i - i % share] for i, step in enumerate(steps)}
    sizes: dict[int, int] = {}
    for step in steps:
        sizes[home[step]] = sizes.get(home[step], 0) + 1
    thinned = []
    for label, points in lines:
        sums: dict[int, float] = {}
        for step, value in points:
            sums[home[step]] = sums.get(home[step], 0.0) + value
        thinned.append((label, [(step, total / sizes[step]) for step, total in sums.items()]))
    return thinned


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map of [low, high] onto [start, end]; a single value lies in the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def nice_ticks(low: float, high: float, wanted: int = 4, whole: bool = False) -> list[float]:
    """Round marks (1, 2 or 5 times a power of ten apart) that reach from at or below `low` to at or above `high`."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        if whole:
            return [low]
        low, high = low - room, high + room
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    gap = max(gap, 1.0) if whole else gap
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [mark * gap for mark in range(first, last + 1)]


def number(value: float) -> str:
    """Short for the eye: ``0``, ``0.0123``, ``1.5e-7``, ``12``, ``1830``; near 1, where ratios lie, ``1.00042``."""
    if not math.isfinite(value):
        return "not finite"
    if value != 1 and abs(value - 1) < 0.01:
        return f"{value:.6f}".rstrip("0").rstrip(".")
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.3g}"
    return _power(f"{value:.1e}")


def tick_labels(marks: Sequence[float]) -> list[str]:
    """Labels that tell neighbouring marks apart: as many decimals as their distance needs."""
    gap = marks[1] - marks[0] if len(marks) > 1 else 1.0
    if 0 < max(abs(mark) for mark in marks) < 1e-3:
        return [_power(f"{mark:.0e}") if mark else "0" for mark in marks]
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{mark:.{decimals}f}" for mark in marks]


def _power(scientific: str) -> str:
    """``1.5e-07`` -> ``1.5e-7``"""
    mantissa, exponent = scientific.split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "not finite"
