"""Rewards of any size through a whole job: evaluation, metrics, files and report."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from actors import job as jobs
from rlsys.config import JobConfig, parse_config
from rlsys.errors import GradingError
from rlsys.run_state.jsonl import read_groups, read_metrics
from rlsys.tracking.progress import Progress
from tests.ray.conftest import JOB

Job = Callable[..., JobConfig]


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


@pytest.fixture(scope="module")
def failed(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, str]:
    """A job whose grader returns no number for the first held-out problem and does not return for the others."""
    where = [f"model.path={micro_base}", f"run.dir={tmp_path_factory.mktemp('failed')}"]
    config = parse_config(JOB, [*where, "rewards={function: 'tests.ray.graders:unwell', timeout_s: 0.2}"])
    with pytest.raises(GradingError) as caught:
        jobs.train(config, Progress())
    return config, str(caught.value)


def test_a_grader_that_sleeps_for_ever_stops_the_run_with_its_counts(failed: tuple[JobConfig, str]) -> None:
    config, message = failed
    assert "5 of 8 grades failed (4 timeouts, 1 errors, 5 tried)" in message
    assert (config.run_dir / "report.html").is_file()


def test_a_reward_that_is_not_finite_ends_the_job_with_its_grader_and_problem(failed: tuple[JobConfig, str]) -> None:
    for part in ("tests.ray.graders:unwell", "held-out problem 0", "returned nan; wanted a finite number"):
        assert part in failed[1]
