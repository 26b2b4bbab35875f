"""Parts of `make gpu-loop` that end in the ways that parts can end; run as `python -m tests.unit.sample_parts`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu_journal import Notes
from benchmarks.gpu_loop_part import part_options, run_and_exit


def behave(options: argparse.Namespace, notes: Notes) -> None:
    (how,) = options.set
    notes.fact("began", how)
    if how == "raises":
        raise ValueError("no such kernel image")
    if how == "misses a bound":
        notes.check("a figure", 2.0, 1.0)
    if how == "is killed":
        print("RuntimeError: out of memory on device 0", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        print("ValueError: waits for a GPU", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        notes.fact("child", child.pid)
        time.sleep(1000)


if __name__ == "__main__":
    run_and_exit(part_options(), behave)
