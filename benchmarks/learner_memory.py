"""Peak memory of a forward and backward pass with a vocabulary of 151,936: the learner against padded batches.

    python -m benchmarks.learner_memory [--dtype bfloat16] [--threads 2] [--repeats 5]

Every repetition of a side is a new process: load model and adapter, read the resident size, run one
``forward_backward`` on the sequences of benchmarks/learner.py, read the peak (VmHWM). The value is the difference. The
model has the body of the 54M shape; the other side is that of benchmarks/learner.py with sequences in random order.
Both processes use glibc's default mmap threshold.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.learner import ALL, BUDGET, HIGH, LOW, OURS, Padded, drawn, ours
from benchmarks.rows import Row, Target, by_turns, finish
from benchmarks.shapes import DTYPE, QWEN_VOCABULARY, S54, write_model
from rlsys import losses

ROOT = Path(__file__).parents[1]


def status(key: str) -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def one(side: str, folder: Path, dtype: str, threads: int, datums: int) -> int:
    """Bytes by which this process grew at most."""
    batch = drawn(datums, QWEN_VOCABULARY)
    if side == OURS:
        learner = ours(folder, dtype, threads)
        loss = losses.resolve("ppo", {"clip_low_threshold": LOW, "clip_high_threshold": HIGH})
        before = status("VmRSS")
        learner.forward_backward("run", batch, loss)
    else:
        torch.set_num_threads(threads)
        padded = Padded(folder, dtype)
        before = status("VmRSS")
        padded.forward_backward(batch, by_length=False)
    return status("VmHWM") - before


def fresh(side: str, folder: Path, dtype: str, threads: int, datums: int) -> float:
    """Growth in MiB, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.learner_memory", "--side", side, "--folder", str(folder)]
    command += ["--dtype", dtype, "--threads", str(threads), "--datums", str(datums)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default=DTYPE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--datums", type=int, default=16)
    parser.add_argument("--side", choices=[OURS, ALL], help="measure this side in this process and print its bytes")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    dtype, threads, datums = arguments.dtype, arguments.threads, arguments.datums
    if arguments.side:
        print(one(arguments.side, arguments.folder, dtype, threads, datums))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_model(folder, S54 | {"vocab_size": QWEN_VOCABULARY}, dtype)
        sides = {side: lambda side=side: fresh(side, folder, dtype, threads, datums) for side in (OURS, ALL)}
        found = by_turns(sides, arguments.repeats, warmups=0)
    batch = drawn(datums, QWEN_VOCABULARY)
    finish(
        Row(
            f"learner_memory_{dtype}",
            f"learner peak memory at vocabulary {QWEN_VOCABULARY:,}, {dtype}",
            "python -m benchmarks.learner_memory",
            "MiB",
            found,
            [Target(OURS, ALL, 0.4, "<=")],
            {
                "base": f"{parameters / 1e6:.1f}M parameters in {dtype}, adapters in float32",
                "threads": threads,
                "sequences": datums,
                "tokens read": len(batch.tokens),
                "token budget": BUDGET,
                "gradient checkpointing": False,
                "prompts shared": False,
            },
        )
    )


if __name__ == "__main__":
    main()
