"""Checks of the learner on a GPU; needs only torch, transformers and peft: ``make gpu-check``.

    python -m benchmarks.gpu_check --out FOLDER               everything, within 6 minutes
    python -m benchmarks.gpu_check --skip-rows                only numerics
    python -m benchmarks.gpu_check --only-rows --row 8b       the rows of one shape, "1.7b" or "8b"
    python -m benchmarks.gpu_check --device cpu               the same parts on a CPU, with tiny shapes

The most important parts run first: numerics of bfloat16, packing, prompt sharing and attention; then the rows with
4,096 tokens per step, Qwen3-1.7B before 8B; the rows with 16,384; the other numerics. Each part and the run
(``--minutes``) have a time limit. A part for which no time remains is skipped, and reported by name.

Every fact is printed and appended to FOLDER/facts.jsonl at once (benchmarks/gpu_journal.py), so that an interrupted run
still has results. At the end FOLDER/gpu_check.json holds all checks. Exit code 1: a check failed; 3: no check failed,
but parts are missing. A row that misses its speed target is not a failed check.

The time estimates below (seconds) are guesses: nobody has run the parts on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import gpu_numerics, gpu_row
from benchmarks.gpu_journal import (
    CUT_OFF,
    DONE,
    LEFT_OUT,
    Journal,
    Part,
    Parts,
    new_journal,
    process_began,
    unusable,
    within,
)
from benchmarks.gpu_parts import Report
from benchmarks.rows import machine

OUT = Path("runs/gpu-check")
MINUTES = {"cuda": 6.0, "cpu": 45.0}  # the default; limits of parts below are for 6 and grow with the total
ROWS = (("1.7b", 4096), ("8b", 4096), ("8b", 16_384), ("1.7b", 16_384))  # 8b stays loaded between its two sizes
TINY_SIZES = {4096: 128, 16_384: 512}
NEEDS = {"1.7b": 25.0, "8b": 60.0}
LIMITS = {"1.7b": 75.0, "8b": 120.0}
NUMERICS_NEED, NUMERICS_LIMIT = 5.0, 60.0
MISSING = 3


@dataclass
class Session:
    """State shared by the parts."""

    options: argparse.Namespace
    report: Report
    bench: gpu_numerics.Bench
    met: dict[str, bool] = field(default_factory=dict)  # of rows: the target was met
    loaded: gpu_row.Loaded | None = None
    tried: set[str] = field(default_factory=set)  # kinds that could not be loaded
    ceiling: float = 0.0

    def parts(self) -> Iterator[Part]:
        """All parts in the order in which they run."""
        numerics = {} if self.options.only_rows else gpu_numerics.checks(self.bench)
        asked = self.options.check or numerics
        wanted = {name: work for name, work in numerics.items() if name in asked}
        yield from (self._numerics(name, wanted[name]) for name in wanted if name in gpu_numerics.FIRST)
        yield from (self._row(*row) for row in ROWS if row[0] in self.options.row and not self.options.skip_rows)
        yield from (self._numerics(name, wanted[name]) for name in wanted if name not in gpu_numerics.FIRST)

    def _numerics(self, name: str, work: Callable[[], Any]) -> Part:
        def alone(limit: float) -> str:
            self.release()  # a row's models would distort the memory that a check measures
            return self._timed(limit, name, work)

        return Part(name, NUMERICS_NEED, NUMERICS_LIMIT * self._stretch, alone)

    def _row(self, kind: str, size: int) -> Part:
        name = f"row {kind} {size}"
        work = partial(self._measured, name, kind, size)
        limit = LIMITS[kind] * self._stretch
        return Part(name, NEEDS[kind], limit, lambda limit: self._timed(limit, name, work))

    def _timed(self, limit: float, name: str, work: Callable[[], Any]) -> str:
        return within(limit, lambda: self.report.run(name, work))

    def _measured(self, name: str, kind: str, size: int) -> tuple[()]:
        note, device, quick = partial(self.report.journal.fact, name), self.options.device, self.options.quick
        if not self.ceiling:
            self.ceiling = gpu_row.ceiling_of(device)
            note("a large product in bfloat16 reaches", self.ceiling / 1e12, "TFLOP/s")
        loaded = self._load(kind, note)
        tokens = TINY_SIZES[size] if quick else size
        repeats = self.options.repeats
        self.met[name] = gpu_row.row(loaded, quick, device, tokens, repeats, self.ceiling, self.options.out, note)
        note("twice the rate of transformers + PEFT", "met" if self.met[name] else "missed")
        return ()

    def _load(self, kind: str, note: gpu_row.Note) -> gpu_row.Loaded:
        """The one in memory where it is of this kind. Loading takes long, so it is tried once."""
        if self.loaded is None or self.loaded.kind != kind:
            self.release()
            if kind in self.tried:
                raise RuntimeError(f"{kind} was not loaded for the row before, nor is it tried again")
            self.tried.add(kind)
            self.loaded = gpu_row.Loaded.load(kind, self.options.quick, self.options.device, note)
            self.tried.remove(kind)
        return self.loaded

    def release(self) -> None:
        """Free the models of a row."""
        if self.loaded is not None:
            loaded, self.loaded = self.loaded, None
            loaded.close(self.options.device)

    @property
    def _stretch(self) -> float:
        return max(1.0, self.options.minutes / MINUTES["cuda"])


def main() -> int:
    options = _options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: found no CUDA device; wanted one, or --device cpu", file=sys.stderr)
        return 2
    _settings()
    journal = new_journal(options.out, process_began())
    _about(journal, options)
    parts = Parts(journal, journal.began + 60 * options.minutes)
    report = Report(journal)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(options, report, gpu_numerics.Bench(Path(folder), options.device, options.quick))
        try:
            parts.run(list(session.parts()))
        finally:
            session.release()
    return _finish(options, parts, session)


def _about(journal: Journal, options: argparse.Namespace) -> None:
    """Record versions, device and options at the start of the run."""
    about = machine()
    for name in ("revision", "python", "processor", "cores"):
        journal.fact("machine", name, about[name])
    journal.fact("machine", "versions", about["versions"])
    if options.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        journal.fact("machine", "GPU", torch.cuda.get_device_name())
        journal.fact("machine", "GPU memory free", free / 2**30, "GiB", total=round(total / 2**30, 1))
        journal.fact("machine", "compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
        journal.fact("machine", "CUDA of torch", torch.version.cuda)
    else:
        journal.fact("machine", "GPU", "not on cpu")


def _finish(options: argparse.Namespace, parts: Parts, session: Session) -> int:
    checks, failed = session.report.checks, session.report.failed
    missing = [*parts.named(CUT_OFF), *parts.named(LEFT_OUT)]
    found = {
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "failed": failed,
        "parts": parts.summary(),
        "targets of rows met": session.met,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "machine": machine(),
        "seconds": round(time.time() - parts.journal.began, 1),
    }
    (options.out / "gpu_check.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed, {len(parts.named(DONE))} parts done")
    for name in failed:
        print(f"FAIL  {name}")
    for name in missing:
        print(f"{parts.outcomes[name].upper()}  {name}")
    print(f"facts: {parts.journal.path}")
    return 1 if failed else MISSING if missing else 0


def _settings() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # no TF32: the bounds are for fp32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of facts.jsonl and the rows; default: {OUT}")
    parser.add_argument("--minutes", type=float, help="of the run, imports included; default: 6, on a CPU 45")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; always so on a CPU")
    parser.add_argument(
        "--row", action="append", choices=sorted(gpu_row.SHAPES), help="again for several; default: all"
    )
    parser.add_argument("--skip-rows", action="store_true")
    parser.add_argument("--only-rows", action="store_true")
    parser.add_argument("--check", action="append", metavar="PART", help="this part of the numerics; again for several")
    parser.add_argument("--repeats", type=int, default=3, help="of each side of a row")
    options = parser.parse_args()
    options.row = options.row or sorted(gpu_row.SHAPES)
    options.minutes = options.minutes or MINUTES[options.device]
    options.quick |= options.device == "cpu"
    if options.minutes <= 0 or options.repeats < 1:
        parser.error(f"--minutes {options.minutes:g} --repeats {options.repeats}: wanted more than 0, and at least 1")
    if (problem := unusable(options.out)) is not None:
        parser.error(f"--out {problem}")
    known = gpu_numerics.checks(gpu_numerics.Bench(Path(), options.device, options.quick))
    for name in options.check or []:
        if name not in known:
            parser.error(f"--check {name!r}: no such part; there is {', '.join(known)}")
    return options


if __name__ == "__main__":
    gc.freeze()  # a row collects garbage before each step, and would look through all that is imported
    sys.exit(main())
