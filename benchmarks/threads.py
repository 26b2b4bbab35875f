"""Seconds of a learner update with two threads over one, by the model's hidden size.

    python -m benchmarks.threads [--repeats 5]
    python -m benchmarks.threads --shapes smollm2        # the real model

Both thread counts alternate in one process, on one learner. Other work on the machine slows two threads more than one,
so the rows say what a free machine gives only when nothing else runs; CPU seconds are printed beside them. The
sequences are those of benchmarks.learner, for every shape.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.learner import ADAM, HIGH, LOW, drawn, ours
from benchmarks.real import real_model
from benchmarks.rows import Row, by_turns, finish
from benchmarks.shapes import DTYPE, S54, TINY, write_model
from rlsys import losses
from rlsys.config import MakeSection
from rlsys.learner.learner import Learner

QUICKSTART = {
    "hidden_size": MakeSection().hidden_size, "intermediate_size": MakeSection().intermediate_size,
    "num_hidden_layers": MakeSection().num_layers, "num_attention_heads": MakeSection().num_heads,
    "num_key_value_heads": MakeSection().num_kv_heads, "head_dim": MakeSection().head_dim,
    "vocab_size": MakeSection().vocab_size,
}  # fmt: skip
SHAPES = {"quickstart": QUICKSTART, "tiny": TINY, "s54": S54, "smollm2": None}
DATUMS = {"quickstart": 8, "tiny": 8, "s54": 8, "smollm2": 8}


def update(learner: Learner, datums: int, vocabulary: int, threads: int, cpu: list[float]) -> Callable[[], float]:
    batch = drawn(datums, vocabulary)
    loss = losses.resolve("ppo", {"clip_low_threshold": LOW, "clip_high_threshold": HIGH})

    def side() -> float:
        torch.set_num_threads(threads)
        began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        learner.forward_backward("run", batch, loss, where="weighted")
        learner.optim_step("run", ADAM)
        took, then = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        cpu.append(then.ru_utime + then.ru_stime - used.ru_utime - used.ru_stime)
        return took

    return side


def measure(name: str, folder: Path, vocabulary: int, repeats: int) -> Row:
    dtype = "float32" if name == "quickstart" else DTYPE
    learner, cpu = ours(folder, dtype, 1), {"one thread": list[float](), "two threads": list[float]()}
    sides = {
        side: update(learner, DATUMS[name], vocabulary, threads, cpu[side]) for threads, side in enumerate(cpu, start=1)
    }
    found = by_turns(sides, repeats)
    shortest = min(found["one thread"]) / min(found["two threads"])
    return Row(
        f"threads_{name}", f"learner update, {name}, by threads", "python -m benchmarks.threads", "s", found,
        equal={"dtype": dtype, "sequences": DATUMS[name]},
        more={
            "speed with two threads over one, shortest of each": round(shortest, 2),
            "CPU s, median": {side: round(median(values[1:]), 2) for side, values in cpu.items()},
        },
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["quickstart", "tiny", "s54"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name in options.shapes:
        shape = SHAPES[name]
        if shape is None:
            finish(measure(name, real_model(), 49_152, options.repeats))
            continue
        with tempfile.TemporaryDirectory() as scratch:
            write_model(Path(scratch), shape, "float32" if name == "quickstart" else DTYPE)
            finish(measure(name, Path(scratch), shape["vocab_size"], options.repeats))


if __name__ == "__main__":
    main()
