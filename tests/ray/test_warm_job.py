"""A job whose learner and sampler are forked computes what it computes otherwise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import JobConfig, dump_config
from tests.ray.conftest import rlsys
from tests.waiting import run as run_to_end

FORKED = "by itself"  # of the note about a process that was not forked
UNEQUAL = ("time", "system/")  # what a run measures of itself


def trained(config: JobConfig, folder: Path) -> tuple[list[dict[str, Any]], bytes, str]:
    """Metrics, adapter and output of `rlsys train`."""
    file = folder / f"{config.run.name}.yaml"
    file.write_text(dump_config(config))
    done = run_to_end([sys.executable, "-m", "rlsys", "train", str(file)], merged=True)
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    equal = [
        {key: at for key, at in line.items() if not key.startswith(UNEQUAL) and "_per_s" not in key} for line in lines
    ]
    return equal, (config.run_dir / "adapter" / "adapter_model.safetensors").read_bytes(), done.stdout


@pytest.mark.soak
def test_a_job_on_a_warm_cluster_ends_with_the_same_bits(
    ray_cluster: str, job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    forked, adapter, output = trained(job("run.name=forked"), tmp_path)
    rlsys("warm", "--stop")
    plain, same_adapter, _ = trained(job("run.name=plain"), tmp_path)
    assert "is warm for 1 thread" in rlsys("warm")
    assert FORKED not in output
    assert forked == plain and same_adapter == adapter
