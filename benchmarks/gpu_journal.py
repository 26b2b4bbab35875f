"""Journal of a run on a rented GPU: facts as JSON lines, and time limits of its parts.

Every fact is printed and appended to `facts.jsonl` at once, so an interrupted run keeps its results. Several processes
can append to one journal: each line is a single write. Needs only the standard library.

    {"s": 41.3, "part": "sharing", "fact": "...", "value": 1.2e-06, "unit": "", "bound": 1e-05, "passed": true}
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

FACTS = "facts.jsonl"
SHOWN = frozenset({"s", "part", "fact", "value", "unit", "bound", "sense", "passed", "note"})  # in places of their own
RAISE_AGAIN_S = 2.0  # an exception in a destructor is dropped, so the alarm repeats
DONE, CUT_OFF, LEFT_OUT, FAILED = "done", "cut off", "left out", "failed"


class CutOff(BaseException):
    """A part exceeded its time limit. Derives from BaseException, so that error handlers inside the part ignore it."""


@dataclass(frozen=True, slots=True)
class Journal:
    """`began`: Unix time from which `s` counts; the processes of one run share it."""

    folder: Path
    began: float

    @property
    def path(self) -> Path:
        return self.folder / FACTS

    def fact(self, part: str, name: str, value: Any, unit: str = "", **more: Any) -> None:
        """Append one line and print it. A float that is not finite is written as a string: JSON has none."""
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        seconds = round(time.time() - self.began, 1)
        line = {"s": seconds, "part": part, "fact": name, "value": value, "unit": unit, **more}
        data = json.dumps(line, default=str) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, data.encode())
        finally:
            os.close(file)
        print(as_text(line), flush=True)


def new_journal(folder: Path, began: float) -> Journal:
    """Start an empty journal; the facts of an earlier run in the same folder are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).write_text("")
    return Journal(folder, began)


def unusable(folder: Path) -> str | None:
    """Reason why results cannot be written to `folder`, which is created if missing; None: they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS).open("a").close()
    except OSError as error:
        return f"{folder}: found {error.strerror or error}; wanted a folder that can be written to"
    return None


def as_text(line: dict[str, Any]) -> str:
    """One fact for the terminal; checks begin with PASS or FAIL."""
    value = f"{line['value']:.4g}" if isinstance(line["value"], float) else line["value"]
    verdict = {True: "PASS  ", False: "FAIL  ", None: ""}[line.get("passed")]
    bound = f", wanted {line.get('sense', '<=')} {line['bound']:.3g}" if "bound" in line else ""
    unit = f" {line['unit']}" if line["unit"] else ""
    more = ", ".join(f"{name} {found}" for name, found in line.items() if name not in SHOWN and found is not None)
    note = f"   {line['note']}" if line.get("note") else ""
    about = f"{line['part']}: {line['fact']}: {value}{unit}{bound}" + (f" ({more})" if more else "")
    return f"{verdict}[{line['s']:6.1f} s] {about}{note}"


def read_facts(folder: Path) -> list[dict[str, Any]]:
    """Facts of a journal; an incomplete last line is ignored."""
    path = folder / FACTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@dataclass(slots=True)
class Notes:
    """Writes the facts of one part; `failed` names the checks that did not pass."""

    journal: Journal
    part: str
    failed: list[str] = field(default_factory=list)

    def fact(self, name: str, value: Any, unit: str = "", **more: Any) -> None:
        self.journal.fact(self.part, name, value, unit, **more)

    def check(self, name: str, value: float, bound: float, sense: str = "<=", unit: str = "", **more: Any) -> None:
        """Compare a value with its bound and record the result. NaN never passes."""
        passed = value <= bound if sense == "<=" else value >= bound
        if not passed:
            self.failed.append(name)
        self.journal.fact(self.part, name, value, unit, bound=bound, sense=sense, passed=bool(passed), **more)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a run. `needs_s`: it is skipped if less time remains; `limit_s`: it is stopped after that time."""

    name: str
    needs_s: float
    limit_s: float
    work: Callable[[float], str]  # given the seconds that it may take; returns DONE or FAILED


@dataclass(slots=True)
class Parts:
    """Runs parts in order within a total. `ends`: Unix time; `outcomes`: name -> DONE, CUT_OFF, LEFT_OUT or FAILED."""

    journal: Journal
    ends: float
    outcomes: dict[str, str] = field(default_factory=dict)

    def run(self, parts: Sequence[Part]) -> None:
        for part in parts:
            left = self.ends - time.time()
            if left < part.needs_s:
                self._ended(part.name, LEFT_OUT, 0.0, f"{max(0.0, left):.0f} s left, wanted {part.needs_s:.0f}")
                continue
            began = time.time()
            outcome = part.work(min(part.limit_s, left))
            self._ended(part.name, outcome, time.time() - began)

    def named(self, outcome: str) -> list[str]:
        return [name for name, found in self.outcomes.items() if found == outcome]

    def summary(self) -> dict[str, list[str]]:
        return {outcome: self.named(outcome) for outcome in (DONE, FAILED, CUT_OFF, LEFT_OUT)}

    def _ended(self, name: str, outcome: str, seconds: float, note: str = "") -> None:
        self.outcomes[name] = outcome
        self.journal.fact(name, "part", outcome, seconds=round(seconds, 1), **({"note": note} if note else {}))


def within(limit_s: float, work: Callable[[], str]) -> str:
    """Call `work` with a time limit: returns its result, or CUT_OFF. Only for the main thread of a process."""
    try:
        with _alarm(limit_s):
            return work()
    except CutOff:
        return CUT_OFF


@contextmanager
def _alarm(limit_s: float) -> Iterator[None]:
    def cut(number: int, frame: FrameType | None) -> None:
        raise CutOff

    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, max(limit_s, 1e-3), RAISE_AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def process_began() -> float:
    """Unix time at which this process started: imports of torch count as time of the run."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot; field 22 of proc(5)
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
