"""Seconds per step of the overlapped and the synchronous loop, with the sampler on core 0 and the learner on core 1.

    python -m benchmarks.overlap_speed [--repeats 5] [--steps 8] [--words 80] [--set section.key=value]

Complete jobs as run by `rlsys train`, alternating; the value of a run is the median of its steps without the first two.
A synchronous step is the sum of its stages; an overlapped step lasts from one weight sync to the next. Held equal: S54
(benchmarks/shapes.py) in bfloat16, or float32 if the CPU has no bfloat16 kernels, with an fp32 adapter of rank 16,
prompts of random words, completions of full length, one thread and one core for sampler and learner each. The length of
prompts is chosen so that sampling and learning take about the same time ("balanced"; both times are shown). The
synchronous loop with two threads and both cores for each stage is also measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from actors.job import train
from benchmarks.grpo_step import Case, folder_of_model
from benchmarks.rows import Row, Target, by_turns, finish
from benchmarks.shapes import DTYPE, S54
from rlsys.config import JobConfig, parse_config
from rlsys.run_state.jsonl import read_metrics
from rlsys.tracking.progress import Progress

PINNED = {"sampler.cores": [0], "learner.cores": [1], "sampler.threads": 1, "learner.threads": 1}
BOTH_CORES = {"sampler.threads": 2, "learner.threads": 2}
OVERLAPPED = {"overlap.max_policy_lag": 1, "sampler.max_live_adapters": 4}
SKIPPED = 2  # steps: engines and caches warm up


def job(name: str, model: Path, folder: Path, options: argparse.Namespace, more: dict[str, Any]) -> JobConfig:
    shortest, longest = options.words - 20, options.words + 20
    task = {"count": 512, "shortest": shortest, "longest": longest, "vocabulary": S54["vocab_size"]}
    set_to: dict[str, Any] = {
        "run.name": name,
        "run.dir": str(folder),
        "model.path": str(model),
        "model.dtype": DTYPE,
        "model.max_length": longest + options.max_tokens,
        "task.name": "benchmarks.grpo_task:RandomWords",
        "task.options": task,
        "rl.steps": options.steps,
        "rl.problems_per_step": options.problems,
        "rl.samples_per_problem": 8,
        "rl.sampling.max_tokens": options.max_tokens,
        "rl.sampling.stop": [],  # the model's end token is never sampled
        "eval.every_steps": 0,
        "eval.max_tokens": 4,
        "checkpoint.every_steps": 10_000,
        "tracking.wandb": "disabled",
        **more,
    }
    return parse_config("{}", [f"{key}={json.dumps(value)}" for key, value in set_to.items()] + options.set)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--set", action="append", default=[], help="section.key=value of every job")
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[1])}
    parts: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="overlap-speed-") as scratch:
        folder = Path(scratch)
        shape = Case("", S54, DTYPE, (options.words, options.words), options.max_tokens, 0.0, 0)
        model = folder_of_model(shape, folder / "model")

        def side(kind: str, more: dict[str, Any]) -> float:
            name = f"{kind}-{len(parts.setdefault(kind, []))}"
            config = job(name, model, folder, options, more)
            train(config, Progress())
            lines = [line for line in read_metrics(config.run_dir) if "time/step_s" in line][SKIPPED:]
            medians = {
                key: statistics.median(line[f"time/{key}_s"] for line in lines if f"time/{key}_s" in line)
                for key in ("step", "sample", "learn", "sync", "grade", "advantage")
                if any(f"time/{key}_s" in line for line in lines)
            }
            parts[kind].append(medians)
            return medians["step"]

        sides = {
            "sync": lambda: side("sync", PINNED),
            "overlapped": lambda: side("overlapped", {**PINNED, **OVERLAPPED}),
        }
        found = by_turns(sides, options.repeats, warmups=0)
        both = [side("both-cores", BOTH_CORES) for _ in range(min(2, options.repeats))]
    row = Row(
        name="overlap",
        title="overlapped loop (lag 1), sampler on core 0 and learner on core 1",
        command="python -m benchmarks.overlap_speed",
        unit="s per step",
        sides=found,
        targets=[Target("sync", "overlapped", 1.6, ">=")],
        equal={
            "model": S54, "dtype": f"{DTYPE} base, float32 adapter", "prompts": options.problems, "group": 8,
            "prompt tokens": [options.words - 20, options.words + 20], "completion tokens": options.max_tokens,
            "pinned": PINNED,
        },
        more={
            "sync with both cores for each stage, s per step": both,
            "seconds of the parts, median": {kind: _middle(runs) for kind, runs in parts.items()},
        },
    )  # fmt: skip
    finish(row)


def _middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


if __name__ == "__main__":
    main()
