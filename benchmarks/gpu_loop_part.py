"""Shared code of the parts of `make gpu-loop`: arguments, and errors recorded as facts."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_journal import Journal, Notes

GIB = 2**30
NOT_ON_CPU = "not on cpu"


def part_options(*flags: str) -> argparse.Namespace:
    """Parse the arguments of a part. `flags`: switches that only this part has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--began", type=float, required=True)
    parser.add_argument("--part", required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--set", action="append", default=[])
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def run_and_exit(options: argparse.Namespace, work: Callable[[argparse.Namespace, Notes], None]) -> None:
    """Exit code 1 where the work raised, whose message is a fact then, or where a check did not pass."""
    notes = Notes(Journal(options.folder, options.began), options.part)
    try:
        work(options, notes)
    except Exception as error:
        traceback.print_exc()
        notes.fact("error", f"{type(error).__name__}: {error}")
        sys.exit(1)
    sys.exit(1 if notes.failed else 0)
