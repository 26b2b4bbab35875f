"""Compares a job of one learner rank and one sampler with the same job at an earlier revision.

    python -m benchmarks.overhead d8be195 [--pairs 3] [--steps 12] [--out overhead.json]

Both revisions run the same YAML on the same base, in both orders, each in a new process with its own Ray cluster.
Compared are the medians of a step's parts (metrics.jsonl, without the first two steps), and the time between the ends
of two steps, which includes the work between steps, such as checkpoints.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlsys import tasks
from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import MakeSection, parse_config
from rlsys.modeling.base_model import initial_model

ROOT = Path(__file__).parents[1]
JOB = """
run: {{name: job, seed: 5, dir: {where}}}
model: {{path: {base}, dtype: float32, max_length: 128}}
task: {{min_operations: 4, max_operations: 5, supervised_max_operations: 5, eval_problems: 32}}
learner: {{logprob_chunk_tokens: 4096}}
rewards: {{function: "tests.ray.graders:variety"}}
rl: {{steps: {steps}, problems_per_step: 32, samples_per_problem: 8, sampling: {{max_tokens: 56}}}}
eval: {{every_steps: 0, max_tokens: 56}}
tracking: {{wandb: disabled}}
"""
PARTS = ("sample", "grade", "advantage", "learn", "sync", "step")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("revision")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        before = folder / "before"
        before.mkdir()
        archive = subprocess.run(["git", "archive", asked.revision], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", str(before)], input=archive.stdout, check=True)
        base = quickstart_shape(folder)
        found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for pair in range(asked.pairs):
            sides = [("before", before), ("after", ROOT)]
            for name, tree in sides if pair % 2 == 0 else sides[::-1]:
                found[name].append(_run(tree, base, folder / f"{name}{pair}", asked.steps))
                print(name, found[name][-1], file=sys.stderr)
    rows = {
        part: {side: statistics.median(run[part] for run in runs) for side, runs in found.items()}
        for part in (*PARTS, "between_ends")
    }
    for part, row in rows.items():
        print(f"{part:13} before {row['before']:.3f} s  after {row['after']:.3f} s  {row['after'] / row['before']:.3f}")
    if asked.out:
        asked.out.write_text(json.dumps({"revision": asked.revision, "rows": rows, "runs": found}, indent=2))


def quickstart_shape(folder: Path) -> Path:
    """A random model of the quickstart's dimensions: how long completions are does not depend on what it learns."""
    out = folder / "base"
    job = parse_config(JOB.format(where=folder, base="x", steps=1))
    problems = tasks.build(job.task, 0).problems("train")
    make = MakeSection()
    tokenizer = build_tokenizer([problem.prompt for problem in problems], make.vocab_size)
    initial_model(make, tokenizer, max_length=128, seed=3, out=out)
    return out


def _run(tree: Path, base: Path, where: Path, steps: int) -> dict[str, float]:
    where.mkdir()
    job = where / "job.yaml"
    job.write_text(JOB.format(where=where, base=base, steps=steps))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["PYTHONPATH"] = str(tree)
    command = [sys.executable, "-m", "rlsys", "train", str(job)]
    subprocess.run(command, cwd=tree, env=env, stdout=subprocess.DEVNULL, check=True, timeout=600)
    lines = [json.loads(line) for line in (where / "job" / "metrics.jsonl").read_text().splitlines()]
    made = [line for line in lines if "time/step_s" in line and line["step"] > 2]
    medians = {part: statistics.median(line[f"time/{part}_s"] for line in made) for part in PARTS}
    ends = [line["time"] for line in made]
    between = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return medians | {"between_ends": statistics.median(between)}


if __name__ == "__main__":
    main()
