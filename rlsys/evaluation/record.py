"""Writes and reads the record of an evaluation, formats it as a table, and compares two records problem by problem.

docs/evaluation.md describes the JSON file.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from rlsys.config import yaml_text
from rlsys.errors import ConfigError
from rlsys.evaluation.statistics import Interval, difference
from rlsys.utils.atomic_files import replace_file

FORMAT, FORMAT_VERSION = "rlsys-evaluation", 1
WIDTH = 100  # characters per line of the text file


@dataclass(frozen=True, slots=True)
class GradedCompletion:
    """Held-out problem and the grades of the policy's completions."""

    id: int
    prompt: str
    answer: str
    grade: float  # of the greedy completion
    passed: int | None  # sampled completions with a grade of rewards.solved_at or more; None: none were sampled


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """Record of an evaluation; every field is plain JSON."""

    kind: str  # base, adapter or merged
    name: str  # name of the files, without suffix
    checkpoint: str  # source of the policy
    base: str
    version: int | None  # optimizer steps of an adapter
    time: float  # Unix time in seconds
    config: Mapping[str, Mapping[str, object]]  # by section
    versions: Mapping[str, str]
    facts: Mapping[str, float]
    confidence: float
    problems: Sequence[GradedCompletion]


def write(record: EvalRecord, folder: Path) -> tuple[Path, Path]:
    """Write <name>.json and <name>.txt and return their paths; existing files are replaced.

    Raises:
        ConfigError: the folder cannot be created or written to.
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
    """Read an evaluation's JSON file.

    Raises:
        ConfigError: the file does not exist, cannot be read, or is not an evaluation of rlsys.
    """
    try:
        body = yaml_text.read_json(path.read_bytes(), str(path))
        file_format = (body.pop("format"), body.pop("format_version"))
        if file_format != (FORMAT, FORMAT_VERSION):
            raise ConfigError(
                f"{path}: found format {file_format[0]!r} version {file_format[1]!r}; wanted {FORMAT!r} version "
                f"{FORMAT_VERSION}"
            )
        return EvalRecord(**{**body, "problems": [GradedCompletion(**problem) for problem in body["problems"]]})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is not an evaluation of rlsys: {type(error).__name__}: {error}") from error


def compare(before: EvalRecord, after: EvalRecord) -> Interval:
    """Return the increase of the mean grade from `before` to `after`, paired by problem.

    The interval has the confidence of `before`.

    Raises:
        ConfigError: the two policies were not evaluated on the same problems.
    """
    problems = [[(graded.id, graded.prompt, graded.answer) for graded in record.problems] for record in (before, after)]
    if problems[0] != problems[1]:
        raise ConfigError(
            f"{before.name} and {after.name}: were not evaluated on the same problems ({len(problems[0])} and "
            f"{len(problems[1])}), so they cannot be compared in pairs; evaluate both with the same configuration"
        )
    old, new = (np.array([graded.grade for graded in record.problems]) for record in (before, after))
    return difference(old, new, before.confidence)


def text(record: EvalRecord) -> str:
    """Format a record as text with a Markdown table."""
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
    """Format the metrics of a record as a table with confidence intervals."""
    facts = record.facts
    level = f"{100 * record.confidence:g} %"
    metrics_table = Table("figure", "value", f"{level} low", f"{level} high", box=MARKDOWN)
    for column in metrics_table.columns[1:]:
        column.justify = "right"
    names = {"accuracy": "greedy accuracy"}
    if facts.get("eval/solved", facts["eval/accuracy"]) != facts["eval/accuracy"]:  # grades other than 0 and 1
        names = {"accuracy": "greedy, mean grade", "solved": f"greedy, grade {_solved_at(record):g} or more"}
    names |= {name: f"pass@{name.rpartition('_')[2]}" for name in _pass_at(facts)}
    for name, label in names.items():
        values = (facts[f"eval/{name}"], facts[f"eval/{name}_low"], facts[f"eval/{name}_high"])
        metrics_table.add_row(label, *(f"{value:.4f}" for value in values))
    metrics_table.add_row("tokens per completion, mean", f"{facts['eval/mean_tokens']:.1f}", "", "")
    metrics_table.add_row("share truncated at max_tokens", f"{facts['eval/truncated_share']:.4f}", "", "")
    return metrics_table


def _solved_at(record: EvalRecord) -> float:
    solved_at = record.config["rewards"]["solved_at"]
    assert isinstance(solved_at, int | float)
    return float(solved_at)


def _pass_at(facts: Mapping[str, float]) -> list[str]:
    names = [name.removeprefix("eval/") for name in facts if name.startswith("eval/pass_at_")]
    return [name for name in names if not name.endswith(("_low", "_high"))]


def _sampled(record: EvalRecord) -> str:
    section = record.config["eval"]
    words = [f"{len(record.problems)} held-out problems", f"greedy, at most {section['max_tokens']} tokens"]
    if section["samples"]:
        words.append(f"pass@k from {section['samples']} completions each at temperature {section['temperature']:g}")
    return "; ".join(words)
