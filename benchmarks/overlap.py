"""Accuracy and time of the quickstart with the synchronous and the overlapped loop; sampler and learner have one core
each.

    python -m benchmarks.overlap [--seeds 21 22 23] [--lags 1 2] [--out overlap.json]

For each seed the synchronous run trains a base from scratch, and all modes use it with the same problems, prompts,
seeds and pinning. Time is that of the RL steps in metrics.jsonl without evaluations: a synchronous step is the sum of
its stages, an overlapped step lasts from one weight sync to the next.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from actors.job import train
from rlsys.config import JobConfig, load_config
from rlsys.run_state.jsonl import read_metrics
from rlsys.tracking.progress import Progress

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PINNED = ["sampler.cores=[0]", "learner.cores=[1]", "tracking.wandb=disabled", "eval.every_steps=0"]


def job(folder: Path, seed: int, lag: int | None, base: Path | None) -> JobConfig:
    name = "sync" if lag is None else f"lag{lag}"
    overrides = [f"run.name={name}-{seed}", f"run.dir={folder}", f"run.seed={seed}", *PINNED]
    overrides += ["sampler.max_live_adapters=4"]  # what lag 2 needs, for all
    overrides += [f"overlap.max_policy_lag={lag}"] if lag is not None else []
    overrides += [f"model.path={base}", "model.make=null"] if base else []
    return load_config(CONFIG, overrides)


def measured(config: JobConfig) -> dict[str, float]:
    outcome = train(config, Progress())
    lines = [line for line in read_metrics(config.run_dir) if "time/step_s" in line]
    steps = [line["time/step_s"] for line in lines]
    return {
        "accuracy_before": outcome.accuracy_before,
        "accuracy_after": outcome.accuracy_after,
        "rl_s": sum(steps),
        "step_s": statistics.median(steps),
        "learn_s": statistics.median(line["time/learn_s"] for line in lines),
        "lag_mean": statistics.mean(line.get("policy/lag_mean", 0.0) for line in lines),
        "ratio_max": max(line.get("policy/ratio_max", 1.0) for line in lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23])
    parser.add_argument("--lags", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="rlsys-overlap-") as scratch:
        folder = Path(scratch)
        for seed in arguments.seeds:
            base = None
            for lag in (None, *arguments.lags):
                config = job(folder, seed, lag, base)
                rows.append({"seed": seed, "lag": lag, **measured(config)})
                base = base or config.run_dir / "base"
                print(json.dumps(rows[-1]), flush=True)
    print("| seed | mode | accuracy before | after | RL steps, s | median step, s | sync / this | mean lag |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        sync = next(other for other in rows if other["seed"] == row["seed"] and other["lag"] is None)
        mode = "sync" if row["lag"] is None else f"lag {row['lag']}"
        accuracies = f"{row['accuracy_before']:.3f} | {row['accuracy_after']:.3f}"
        times = f"{row['rl_s']:.1f} | {row['step_s']:.2f} | {sync['rl_s'] / row['rl_s']:.2f}"
        print(f"| {row['seed']} | {mode} | {accuracies} | {times} | {row['lag_mean']:.2f} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
