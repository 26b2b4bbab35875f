"""What the mmap threshold and the bounded kernel caches of `rlsys.planning.memory.bound_growth` cost and save in a
learner of SmolLM2-135M-Instruct.

    python -m benchmarks.heap [--thresholds 1 8 0] [--repeats 3] [--updates 3] [--threads 2] [--dtype bfloat16]

Thresholds are MiB; 0 keeps glibc's own, which adapts up to 32 MiB. Every measurement is a process of its own, in turns:
its CPU seconds and page faults per update after the first one, and its peak resident size. An update has completions of
other lengths than the one before, so that shapes do not repeat, as in a job.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from benchmarks.real import real_model

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Cost:
    cpu_s: float  # per update
    wall_s: float  # per update
    faults: float  # per update
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thresholds", nargs="+", type=int, default=[1, 8, 0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--inside", type=int)
    options = parser.parse_args()
    if options.inside is not None:
        print(json.dumps(asdict(cost(options.inside, options.updates, options.threads, options.dtype))))
        return
    found: dict[int, list[Cost]] = {threshold: [] for threshold in options.thresholds}
    for repeat in range(options.repeats):
        for threshold in options.thresholds:
            command = [sys.executable, "-m", "benchmarks.heap", "--inside", str(threshold), "--dtype", options.dtype]
            more = ["--updates", str(options.updates), "--threads", str(options.threads)]
            said = subprocess.run([*command, *more], stdout=subprocess.PIPE, text=True, check=True).stdout
            found[threshold].append(Cost(**json.loads(said.splitlines()[-1])))
            print(repeat + 1, threshold, found[threshold][-1], file=sys.stderr, flush=True)
    for threshold, costs in found.items():
        values = {name: statistics.median(getattr(each, name) for each in costs) for name in Cost.__slots__}
        print(f"{threshold or 'glibc':>6} MiB", {name: round(value, 2) for name, value in values.items()})


def cost(threshold: int, updates: int, threads: int, dtype: str) -> Cost:
    from rlsys.planning import memory

    if threshold:
        memory.bound_growth(memory.SMALL_HIDDEN, threshold * MIB)

    import numpy as np

    from benchmarks.learner import ADAM, aligned, ours
    from rlsys import losses

    loss = losses.resolve("importance_sampling")
    learner = ours(real_model(), dtype, threads, share=True)
    random = np.random.default_rng(0)

    def update() -> None:
        prompts = np.repeat(random.integers(100, 151, 4), 8)
        ids = [random.integers(1, 40_000, int(prompt) + int(random.integers(40, 121))) for prompt in prompts]
        for first in range(0, 32, 8):
            for member in range(first, first + 8):
                ids[member][: prompts[first]] = ids[first][: prompts[first]]
        logprobs = np.full(sum(len(each) - 1 for each in ids), -10.0)
        batch = aligned(ids, prompts, logprobs, random.normal(size=32))
        learner.forward_backward("run", batch, loss, where="weighted")
        learner.optim_step("run", ADAM)

    update()
    before, began, cpu = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), time.process_time()
    for _ in range(updates):
        update()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return Cost(
        (time.process_time() - cpu) / updates,
        (time.perf_counter() - began) / updates,
        (after.ru_minflt - before.ru_minflt) / updates,
        after.ru_maxrss / 1024,
    )


if __name__ == "__main__":
    main()
