"""Speed of the learner with torch.compile: seconds of one update with compiled and with uncompiled layers.

    python -m benchmarks.compiled [--dtype bfloat16] [--threads 2] [--repeats 5]

The update of benchmarks/learner.py on three batches of different lengths, as in the steps of a job. ``parts`` compiles
the MLP of each layer, which has no graph breaks; ``layers`` compiles complete layers, including attention on packed
segments. Shapes are dynamic. Compiling needs a C++ compiler and happens in the warm-up; its time is printed. Held
equal: model, adapter, batches, budget, threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.learner import ADAM, BUDGET, HIGH, LOW, drawn, ours
from benchmarks.rows import Row, by_turns, finish
from benchmarks.shapes import DTYPE, S54, write_model
from rlsys import losses
from rlsys.learner.learner import Learner

PLAIN, PARTS, LAYERS = "as they are", "MLPs compiled", "layers compiled"


def compiled(learner: Learner, side: str) -> Learner:
    for layer in learner._model.base_model.layers if side != PLAIN else []:
        part = layer.mlp if side == PARTS else layer
        part.forward = torch.compile(part.forward, dynamic=True)
    return learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default=DTYPE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--datums", type=int, default=8)
    parser.add_argument("--sides", nargs="+", default=[PLAIN, PARTS, LAYERS])
    options = parser.parse_args()
    batches = [drawn(options.datums, S54["vocab_size"], seed) for seed in range(3)]
    loss = losses.resolve("ppo", {"clip_low_threshold": LOW, "clip_high_threshold": HIGH})
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), S54, options.dtype)
        learners = {side: compiled(ours(Path(name), options.dtype, options.threads), side) for side in options.sides}

    def updates(learner: Learner) -> float:
        began = time.perf_counter()
        for batch in batches:
            learner.forward_backward("run", batch, loss, where="weighted")
            learner.optim_step("run", ADAM)
        return (time.perf_counter() - began) / len(batches)

    first = {side: round(updates(learner), 1) for side, learner in learners.items()}
    found = by_turns(
        {side: partial(updates, learner) for side, learner in learners.items()}, options.repeats, warmups=1
    )
    finish(
        Row(
            f"compiled_{options.dtype}",
            f"torch.compile in the learner, {options.dtype}",
            "python -m benchmarks.compiled",
            "s per update",
            found,
            equal={
                "model": "54M Qwen3 shape",
                "sequences": options.datums,
                "token budget": BUDGET,
                "threads": options.threads,
            },
            more={"seconds of the first updates, compiling included": first},
        )
    )


if __name__ == "__main__":
    main()
