"""Writes report.html: one HTML page per run, without external files, network access or JavaScript libraries.

charts.py, rollouts.py and problems.py compute plain numbers; the files in templates/ only draw them. The template
escapes all generated text, and the page's Content-Security-Policy allows only our script and style sheet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlsys.errors import ConfigError
from rlsys.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, SECTIONS, TOP, WIDTH, chart, series
from rlsys.report.numbers import number, percent
from rlsys.report.problems import outcomes
from rlsys.report.rollouts import EXTREME_STEPS, RATIO_LEVELS, pairs, samples, verdicts
from rlsys.run_state.jsonl import (
    CONFIG,
    ENVIRONMENT,
    ERRORS,
    METRICS,
    Record,
    read_groups,
    read_metrics,
    read_problems,
    read_rollouts,
)
from rlsys.run_state.saved_rollouts import format_steps
from rlsys.tracking.learning_checks import learning_warnings
from rlsys.tracking.progress import duration, held_out_name
from rlsys.utils.atomic_files import replace_file

TEMPLATES = Path(__file__).parent / "templates"
REPORT = "report.html"
MAX_ERRORS = 20_000  # last characters of errors.log
CLOSED = ("System", "Supervised stage")  # chart sections that are collapsed at first


def write_report(run_dir: Path) -> Path:
    """Write report.html from the files of the run; each of them may be missing or empty."""
    path = run_dir / REPORT
    replace_file(path, page(run_dir).encode("utf-8", errors="replace"))  # a model can write half of a surrogate pair
    return path


def report_of(run_dir: Path) -> Path:
    """Write report.html for a folder given by a user.

    Raises:
        ConfigError: the folder holds no run.
    """
    if not any((run_dir / name).is_file() for name in (CONFIG, METRICS)):
        raise ConfigError(f"{run_dir}: found neither {CONFIG} nor {METRICS}; wanted the directory of a run")
    return write_report(run_dir)


def page(run_dir: Path) -> str:
    records, rows = read_metrics(run_dir), read_rollouts(run_dir)
    config_text = _text(run_dir / CONFIG)
    config = _config(run_dir / CONFIG, config_text)
    steps = _section(config, "rl").get("steps")
    charts = {title: [(spec, chart(spec, records)) for spec in specs] for title, specs in SECTIONS.items()}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    environment.filters["verdict"] = verdicts([row.reward for row in rows])
    script, style = (_text(TEMPLATES / name) for name in ("report.js", "report.css"))
    return environment.get_template("report.html.j2").render(
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
        name=_section(config, "run").get("name", run_dir.name),
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        headline=headline(records),
        signs=[(_steps(sign.steps), sign.text) for sign in learning_warnings(records, config)],
        tiles=tiles(records, steps if isinstance(steps, int) else None),
        sections={title: [drawing for _, drawing in drawings if drawing] for title, drawings in charts.items()},
        closed=CLOSED,
        missing=[spec.title for drawings in charts.values() for spec, drawing in drawings if not drawing],
        size={"w": WIDTH, "h": HEIGHT, "l": LEFT, "r": WIDTH - RIGHT, "t": TOP, "b": HEIGHT - BOTTOM},
        samples=samples(rows),
        extreme_steps=EXTREME_STEPS,
        ratio_levels=RATIO_LEVELS,
        outcomes=outcomes(read_groups(run_dir), read_problems(run_dir)),
        pairs=pairs(rows),
        errors=_text(run_dir / ERRORS)[-MAX_ERRORS:],
        config=config_text,
        environment=_environment(run_dir / ENVIRONMENT),
    )


def _config(path: Path, text: str) -> dict[str, object]:
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: is damaged: found {type(found).__name__}; wanted the sections of a job")
    return found


def _section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _environment(path: Path) -> dict[str, object]:
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _steps(steps: Sequence[int]) -> str:
    """List the steps if there are few; otherwise their number and range."""
    listed = format_steps(list(steps))
    return listed if len(listed) <= 40 else f"{len(steps)} of the steps {steps[0]} to {steps[-1]}"


def headline(records: Sequence[Record]) -> dict[str, str] | None:
    """Accuracy, or the mean reward if rewards are not 0 or 1, at the first and the last evaluation; None without an
    evaluation."""
    accuracy = series(records, "eval/accuracy")
    if not accuracy:
        return None
    (first_step, before), (last_step, after) = accuracy[0], accuracy[-1]
    low, high = (dict(series(records, f"eval/accuracy_{end}")) for end in ("low", "high"))
    known = last_step in low and last_step in high
    name = held_out_name(*(value for _, value in accuracy))
    is_share = name == "accuracy"
    said = percent if is_share else number
    return {
        "name": "Held-out accuracy" if is_share else "Held-out reward",
        "before": said(before),
        "after": said(after) if len(accuracy) > 1 else "",
        "gain": f"{(after - before) * 100:+.1f} points" if is_share else f"{after - before:+.3g}",
        "verdict": "good" if after > before else "bad" if after < before else "part",
        "steps": f"steps {first_step} to {last_step}",
        "interval": f"interval {said(low[last_step])} to {said(high[last_step])}" if known else "",
    }


def tiles(records: Sequence[Record], wanted_steps: int | None = None) -> list[tuple[str, str]]:
    """Key numbers of the run: (label, value)."""
    found = []
    reward = series(records, "reward/mean")
    if reward:
        of = f" of {wanted_steps}" if wanted_steps else ""
        found.append(("RL steps", f"{reward[-1][0]}{of}"))
        found.append(("mean reward, first to last", f"{number(reward[0][1])} → {number(reward[-1][1])}"))
    if records:
        found.append(("time from first to last metric", duration(records[-1]["time"] - records[0]["time"])))
        found.append(("last metric", time.strftime("%m-%d %H:%M", time.localtime(records[-1]["time"]))))
    step_s = [value for _, value in series(records, "time/step_s")]
    if step_s:
        found.append(("mean step time", f"{number(sum(step_s) / len(step_s))} s"))
    difference = [value for _, value in series(records, "policy/logprob_diff_mean")]
    if difference:
        found.append(("largest mean |p − q|", f"{number(max(difference))} nats"))  # noqa: RUF001
    return found
