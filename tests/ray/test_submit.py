"""deploy/submit.sh on a real cluster with a dashboard."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rlsys.config import JobConfig, dump_config
from rlsys.run_state.jsonl import read_metrics
from tests.waiting import cpu_of, run

ROOT = Path(__file__).parents[2]


def test_a_submitted_job_runs_on_the_cluster_and_writes_its_run(
    dashboard: str, job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    config = job("rl.steps=1")
    (tmp_path / "job.yaml").write_text(dump_config(config))
    command = [str(ROOT / "deploy" / "submit.sh"), dashboard, str(tmp_path / "job.yaml")]
    done = run(command, signs=[cpu_of(os.getpid())])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout and "held-out accuracy" in done.stdout
    assert [line["step"] for line in read_metrics(config.run_dir) if "reward/mean" in line] == [1]


def test_a_submitted_job_that_fails_says_why(dashboard: str, job: Callable[..., JobConfig], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(dump_config(job()).replace("steps:", "stepz:", 1))
    command = [str(ROOT / "deploy" / "submit.sh"), dashboard, str(tmp_path / "job.yaml")]
    done = run(command, signs=[cpu_of(os.getpid())])
    assert done.returncode == 1
    assert "stepz is no key" in done.stdout + done.stderr
