"""What an evaluation leaves: one JSON file with all of it, a table for people, and two of them compared by problem.

docs/evaluation.md describes the file.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from rlsys.config import yaml_text
from rlsys.errors import ConfigError
from rlsys.evaluation.statistics import Interval, difference
from rlsys.utils.atomic_files import replace_file

FORMAT, FORMAT_VERSION = "rlsys-evaluation", 1
WIDTH = 100  # of the table in its file


@dataclass(frozen=True, slots=True)
class GradedCompletion:
    """One held-out problem and how the policy did."""

    id: int
    prompt: str
    answer: str
    grade: float  # of the greedy completion
    passed: int | None  # of the sampled completions, those of rewards.solved_at or more; None: none were sampled


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """An evaluation; every field is of plain JSON."""

    kind: str  # base, adapter or merged
    name: str  # of the files
    checkpoint: str  # where the policy was found
    base: str
    version: int | None  # optimizer steps, of an adapter
    time: float  # Unix, seconds
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    facts: Mapping[str, float]
    confidence: float
    problems: Sequence[GradedCompletion]


def write(record: EvalRecord, folder: Path) -> tuple[Path, Path]:
    """<name>.json and <name>.txt; they take the place of those of an evaluation before.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(record)}
    data, table = folder / f"{record.name}.json", folder / f"{record.name}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(data, (json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        replace_file(table, text(record).encode())
    except OSError as error:
        raise ConfigError(f"{folder}: the evaluation cannot be written there: {error.strerror}") from error
    return data, table


def read(path: Path) -> EvalRecord:
    """
    Raises:
        ConfigError: the file is not there, or is no evaluation of rlsys.
    """
    try:
        body = yaml_text.read_json(path.read_bytes(), str(path))
        found = (body.pop("format"), body.pop("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            raise ConfigError(f"{path}: found {found[0]!r} {found[1]!r}; wanted {FORMAT!r} {FORMAT_VERSION}")
        return EvalRecord(**{**body, "problems": [GradedCompletion(**problem) for problem in body["problems"]]})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is no evaluation of rlsys: {type(error).__name__}: {error}") from error


def compare(before: EvalRecord, after: EvalRecord) -> Interval:
    """By how much the second policy's mean grade is above the first's on the same problems, at the first's confidence.

    Raises:
        ConfigError: they were not evaluated on the same problems.
    """
    asked = [[(one.id, one.prompt, one.answer) for one in record.problems] for record in (before, after)]
    if asked[0] != asked[1]:
        raise ConfigError(
            f"{before.name} and {after.name}: were not evaluated on the same problems ({len(asked[0])} and "
            f"{len(asked[1])}), so they cannot be compared in pairs; evaluate both with one configuration"
        )
    old, new = (np.array([one.grade for one in record.problems]) for record in (before, after))
    return difference(old, new, before.confidence)


def text(record: EvalRecord) -> str:
    """For people; the table is Markdown."""
    file = io.StringIO()
    console = Console(file=file, width=WIDTH, highlight=False, markup=False)
    at = "" if record.version is None else f" at version {record.version}"
    console.print(f"{record.config['run']['name']}: {record.kind}{at}", soft_wrap=True)
    console.print(f"checkpoint {record.checkpoint}", soft_wrap=True)
    console.print(f"base {record.base}", soft_wrap=True)
    console.print(time.strftime("evaluated %Y-%m-%d %H:%M UTC", time.gmtime(record.time)))
    console.print(_sampled(record), soft_wrap=True)
    console.print(table(record))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).rstrip() + "\n"


def table(record: EvalRecord) -> Table:
    facts = record.facts
    ends = f"{100 * record.confidence:g} %"
    shown = Table("figure", "value", f"{ends} low", f"{ends} high", box=MARKDOWN)
    for column in shown.columns[1:]:
        column.justify = "right"
    names = {"accuracy": "greedy accuracy"}
    if facts.get("eval/solved", facts["eval/accuracy"]) != facts["eval/accuracy"]:  # grades that are not 0 and 1
        names = {"accuracy": "greedy, mean grade", "solved": f"greedy, grade {_solved_at(record):g} or more"}
    names |= {name: f"pass@{name.rpartition('_')[2]}" for name in _pass_at(facts)}
    for name, label in names.items():
        values = (facts[f"eval/{name}"], facts[f"eval/{name}_low"], facts[f"eval/{name}_high"])
        shown.add_row(label, *(f"{value:.4f}" for value in values))
    shown.add_row("tokens of a completion, mean", f"{facts['eval/mean_tokens']:.1f}", "", "")
    shown.add_row("share cut off at max_tokens", f"{facts['eval/truncated_share']:.4f}", "", "")
    return shown


def _solved_at(record: EvalRecord) -> float:
    return float(record.config["rewards"]["solved_at"])


def _pass_at(facts: Mapping[str, float]) -> list[str]:
    names = [name.removeprefix("eval/") for name in facts if name.startswith("eval/pass_at_")]
    return [name for name in names if not name.endswith(("_low", "_high"))]


def _sampled(record: EvalRecord) -> str:
    section = record.config["eval"]
    words = [f"{len(record.problems)} held-out problems", f"greedy, at most {section['max_tokens']} tokens"]
    if section["samples"]:
        words.append(f"pass@k from {section['samples']} completions of each at temperature {section['temperature']:g}")
    return "; ".join(words)
