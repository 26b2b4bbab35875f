"""Runs for the tests of run_state: a small job, its checkpoints, and its ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlsys.config import JobConfig, load_config
from rlsys.data.problems import Epochs
from rlsys.run_state.ledger import TRAINED, Ledger
from rlsys.run_state.run_dir import RunStore

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


FILES = {"adapter_model.safetensors": b"weights" * 100, "optimizer.safetensors": b"moments" * 200, "a/b.json": b"{}"}


def config(folder: Path, *overrides: str) -> JobConfig:
    return load_config(QUICKSTART, ["run.name=kept", f"run.dir={folder}", "rl.steps=6", *overrides])


def ledger_at(step: int, job: JobConfig) -> Ledger:
    ledger = Ledger(Epochs(job.task.train_problems or 4096, job.rl.problems_per_step, job.run.seed))
    for done in range(1, step + 1):
        ledger.draw(done, job.rl.problems_per_step)
        ledger.settle(done, np.full(job.rl.problems_per_step, TRAINED))
    return ledger


def files_at(step: int) -> dict[str, bytes]:
    return {**FILES, "step.txt": str(step).encode()}


def saved(job: JobConfig, *steps: int) -> Path:
    """A run whose driver has saved these steps and ended."""
    with RunStore.open(job, note=lambda text: None) as store:
        for step in steps:
            store.save(step, files_at(step), ledger_at(step, job))
    return job.run_dir / "checkpoints"


def folders(job: JobConfig) -> list[str]:
    return sorted(path.name for path in (job.run_dir / "checkpoints").iterdir())
