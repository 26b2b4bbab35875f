"""Rewards of any size through a whole job: evaluation, metrics, files and report."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors import job as jobs
from rlsys.config import JobConfig, dump_config
from rlsys.errors import GradingError
from rlsys.run_state.jsonl import read_groups, read_metrics
from rlsys.tracking.progress import Progress
from tests.waiting import run

Job = Callable[..., JobConfig]
ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(r"```python\n# my_rewards\.py\n(.*?)```", re.DOTALL)


def test_the_reward_function_of_the_docs_runs_as_the_docs_say(job: Job, tmp_path: Path) -> None:
    found = EXAMPLE.search((ROOT / "docs" / "extending.md").read_text("utf-8"))
    assert found is not None
    (tmp_path / "my_rewards.py").write_text(found[1], "utf-8")
    config = job("rewards.function=null", "run.name=brief", "rl.steps=1", "eval.samples=2")
    (tmp_path / "job.yaml").write_text(dump_config(config), "utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), "."])
    done = run(
        [sys.executable, "-m", "rlsys", "train", "job.yaml", "rewards.function=my_rewards:brief"],
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(config.run_dir)
    evaluated = [line for line in lines if "eval/accuracy" in line]
    assert [line["step"] for line in evaluated] == [0, 1]
    for line in evaluated:
        assert -0.2 < line["eval/accuracy"] < 0, "a random model is wrong, and pays for each character"
        assert line["eval/accuracy_low"] <= line["eval/accuracy"] <= line["eval/accuracy_high"]
        assert line["eval/solved"] == line["eval/pass_at_1"] == 0
    assert "held-out reward" in done.stdout
    assert "Held-out reward" in (config.run_dir / "report.html").read_text("utf-8")


def test_large_negative_and_fractional_rewards_go_through_a_whole_job(ray_cluster: str, job: Job) -> None:
    config = job("rewards.function=tests.ray.graders:cost", "rewards.solved_at=-4000", "rl.steps=2", "eval.samples=2")
    outcome = jobs.train(config, Progress())
    assert outcome.steps == 2 and outcome.accuracy_before < -1
    for line in read_metrics(config.run_dir):
        if "eval/accuracy" in line:
            assert line["eval/accuracy_low"] < line["eval/accuracy"] < line["eval/accuracy_high"] < 0
            assert 0 < line["eval/solved"] < 1 and 0 < line["eval/pass_at_1"] < 1
        if "reward/mean" in line:
            assert line["reward/mean"] < -1 and math.isfinite(line["reward/std"]) and line["datums/count"] > 0
    for row in read_groups(config.run_dir):
        assert all(0 <= share <= 1 for share in row.solved) and all(grade < 0 for grade in row.grades)
    assert (config.run_dir / "report.html").is_file()


def test_a_reward_that_is_not_finite_ends_the_job_with_its_grader_and_problem(ray_cluster: str, job: Job) -> None:
    with pytest.raises(GradingError) as caught:
        jobs.train(job("rewards.function=tests.ray.graders:undefined"), Progress())
    for part in ("tests.ray.graders:undefined", "held-out problem 0", "returned nan; wanted a finite number"):
        assert part in str(caught.value)
