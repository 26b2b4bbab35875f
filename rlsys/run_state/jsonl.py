"""The line-by-line files of a run: what a line holds, and how lines are read, written and cut back.

docs/metrics.md lists the files. A line is one JSON object; a last line that a dead writer left incomplete is ignored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from rlsys.errors import RlsysError
from rlsys.utils.atomic_files import replace_file

METRICS, ROLLOUTS, GROUPS, PROBLEMS = "metrics.jsonl", "rollouts.jsonl", "groups.jsonl", "problems.jsonl"
CONFIG, ENVIRONMENT, ERRORS = "config.yaml", "environment.json", "errors.log"
# A line of metrics.jsonl: `stage` is a text, all other values are numbers. A TypedDict cannot list metrics, which are
# named at run time, and with a union every reader would have to test the value of a key whose type is known.
Record = Mapping[str, Any]
RECORD_KEYS = ("step", "time", "stage", "row")  # of a line of metrics.jsonl; every other key is a metric

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """One completion in readable form. The lists have an entry per token, or are empty if not requested."""

    step: int
    phase: Literal["before", "train", "after"]
    prompt: str
    completion: str
    answer: str
    reward: float
    advantage: float | None  # None: greedy evaluation has no group
    tokens: int  # of the completion
    stop_reason: str
    problem: int  # its id; UNKNOWN in files of rlsys 0.1.0 before there were ids
    pieces: Sequence[str]  # the completion, cut into its tokens
    advantages: Sequence[float]
    ratios: Sequence[float | None]  # p / q; None: not trained on
    sampled: Sequence[bool]  # False: a reply of the environment


UNKNOWN = -1
TOKEN_FIELDS = ("pieces", "advantages", "ratios", "sampled")  # of a RolloutRow


@dataclass(frozen=True, slots=True)
class GroupsRow:
    """Outcomes of the groups of one step."""

    step: int
    problems: Sequence[int]
    solved: Sequence[float]  # share of right completions in each group; mean grade in files of 0.1.0
    grades: Sequence[float] = field(default_factory=list)  # mean grade of each; empty in files of 0.1.0


@dataclass(frozen=True, slots=True)
class ProblemRow:
    id: int
    prompt: str
    answer: str


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order written, metrics as floats; no file means no lines."""
    return [
        {key: value if key in RECORD_KEYS else float(value) for key, value in record.items()}
        for record in read_lines(run_dir / METRICS)
    ]


def read_rollouts(run_dir: Path) -> list[RolloutRow]:
    """The rows of rollouts.jsonl in the order written; no file means no rows."""
    return [rollout_of(record) for record in read_lines(run_dir / ROLLOUTS)]


def read_groups(run_dir: Path) -> list[GroupsRow]:
    return [
        GroupsRow(
            record["step"],
            record["problems"],
            [float(value) for value in record["solved"]],
            [float(value) for value in record.get("grades", [])],
        )
        for record in read_lines(run_dir / GROUPS)
    ]


def write_problems(run_dir: Path, prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Write problems.jsonl; a problem's id is its index in the training set."""
    rows = (ProblemRow(at, *text) for at, text in enumerate(zip(prompts, answers, strict=True)))
    replace_file(run_dir / PROBLEMS, "".join(line_of(asdict(row)) for row in rows).encode())


def read_problems(run_dir: Path) -> dict[int, ProblemRow]:
    """Problems by id; no file means no problems."""
    return {record["id"]: ProblemRow(**record) for record in read_lines(run_dir / PROBLEMS)}


def last_step(run_dir: Path) -> int:
    """The last RL step in metrics.jsonl; 0 without one."""
    return max((record["step"] for record in read_lines(run_dir / METRICS) if record["stage"] == "rl"), default=0)


def rollout_of(record: Mapping[str, Any]) -> RolloutRow:
    """A line of rollouts.jsonl; lines of early files have no tokens."""
    numbers = {
        "reward": float(record["reward"]),
        "advantage": _optional(record["advantage"]),
        "advantages": [float(value) for value in record.get("advantages", ())],
        "ratios": [_optional(value) for value in record.get("ratios", ())],
    }
    return RolloutRow(**{"problem": UNKNOWN, "pieces": [], "sampled": [], **record, **numbers})


def metrics_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a line of metrics.jsonl."""
    return {name: value for name, value in record.items() if name not in RECORD_KEYS}


def open_to_append(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def write_line(file: TextIO, record: Mapping[str, Any], sync: bool = True) -> None:
    """Write one line of strict JSON; on disk when this returns, or with `sync` false after a later synced line."""
    file.write(line_of(record))
    file.flush()
    if sync:
        os.fsync(file.fileno())


def line_of(record: Mapping[str, Any]) -> str:
    """A float that is not finite becomes "NaN", "Infinity" or "-Infinity"."""
    return json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def cut_lines(path: Path, keeps: Callable[[Mapping[str, Any]], bool], note: Note) -> list[dict[str, Any]]:
    """Remove the lines that are not kept and an incomplete last line; returns the remaining lines."""
    if not path.is_file():
        return []
    found = list(read_lines(path))
    kept = [record for record in found if keeps(record)]
    before, after = path.read_bytes(), b"".join(line_of(record).encode() for record in kept)
    if before != after:
        replace_file(path, after)
    if len(found) < sum(map(bool, before.split(b"\n"))):
        note(f"{path}: removed its last line, which a writer that died left incomplete")
    return kept


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                yield json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer died within this line
                return
            raise RlsysError(
                f"{path}:{number}: found a line that is no JSON ({error}); wanted a JSON object"
            ) from error
