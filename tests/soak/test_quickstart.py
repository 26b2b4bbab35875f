"""The quickstart whole, for several seeds: `make soak`. About two minutes each on two quiet cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.run_state.jsonl import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [21, 22, 23, 1, 2, 3])
def test_reinforcement_learning_raises_held_out_accuracy_from_at_most_06_to_at_least_09(
    seed: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "rlsys", "train", str(ROOT / "configs" / "quickstart.yaml")]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, f"run.seed={seed}", f"run.dir={tmp_path}"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    lines = read_metrics(tmp_path / "quickstart")
    accuracies = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    print(f"seed {seed}: accuracy {accuracies}, {done.stdout[done.stdout.rindex('  time') :].splitlines()[0].strip()}")
    assert accuracies[0] <= 0.6 and accuracies[-1] >= 0.9, accuracies
    worst = max(line["policy/logprob_diff_mean"] for line in lines if "policy/logprob_diff_mean" in line)
    assert worst < 1e-5, f"float32 on both sides: mean |p - q| was {worst}"
