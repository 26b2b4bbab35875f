"""Overlapped running with every part real: the same learning, and samplers that do not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from actors import job as jobs
from rlsys.config import JobConfig
from rlsys.replay.replay_step import replay
from rlsys.run_state.jsonl import read_groups, read_metrics
from rlsys.run_state.resume import newest
from rlsys.run_state.saved_rollouts import load_step
from rlsys.tracking.progress import Progress

Job = Callable[..., JobConfig]
STEPS = 4


def trained(config: JobConfig) -> JobConfig:
    assert jobs.train(config, Progress()).steps == config.rl.steps
    return config


def steps_of(config: JobConfig) -> list[dict[str, float]]:
    return [line for line in read_metrics(config.run_dir) if "reward/mean" in line]


def test_lag_0_makes_the_sync_loops_datums_and_adapter_to_the_bit(undisturbed: JobConfig, job: Job) -> None:
    overlapped = trained(job("run.name=lag0", "rl.steps=2", "overlap.max_policy_lag=0"))
    for step in (1, 2):
        a, b = load_step(undisturbed.run_dir, step), load_step(overlapped.run_dir, step)
        for field in fields(a.rollouts):
            np.testing.assert_array_equal(getattr(a.rollouts, field.name), getattr(b.rollouts, field.name), field.name)
        np.testing.assert_array_equal(a.rewards, b.rewards)
    name = "adapter_model.safetensors"
    two_steps = (undisturbed.run_dir / "checkpoints" / "step-000002" / name).read_bytes()
    assert two_steps == (overlapped.run_dir / "adapter" / name).read_bytes()


@pytest.fixture(scope="module")
def ahead(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """A run with lag 2 whose steps are learned in two substeps of two pieces each."""
    from rlsys.config import parse_config
    from tests.ray.conftest import JOB

    overrides = [
        "overlap.max_policy_lag=2",
        "sampler.max_live_adapters=4",
        "overlap.minibatches=2",
        "rl.substeps=2",
        f"rl.steps={STEPS}",
        "eval.every_steps=2",
        f"model.path={micro_base}",
        f"run.dir={tmp_path_factory.mktemp('ahead')}",
    ]
    return trained(parse_config(JOB, overrides))


def test_no_token_is_older_than_the_lag_and_some_are_as_old(ahead: JobConfig) -> None:
    for step in range(1, STEPS + 1):
        recorded = load_step(ahead.run_dir, step)
        lags = recorded.version - recorded.rollouts.versions
        assert lags.min() >= 0 and lags.max() <= 2 * ahead.rl.substeps
    assert max(line["policy/lag_max"] for line in steps_of(ahead)) >= ahead.rl.substeps


def test_every_step_can_be_computed_again_to_the_bit_without_ray_or_vllm(ahead: JobConfig) -> None:
    for step in range(1, STEPS + 1):
        assert replay(ahead.run_dir, step).differing(0.0) == []


def test_lag_and_ratio_of_every_step_are_in_the_metrics(ahead: JobConfig) -> None:
    lines = steps_of(ahead)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["policy/version"] for line in lines] == [2, 4, 6, 8]
    assert all(
        {"policy/lag_mean", "policy/ratio_mean", "policy/ratio_max", "time/waiting_s"} <= line.keys() for line in lines
    )
    assert lines[0]["policy/lag_max"] == 0 and lines[0]["policy/logprob_diff_max"] > 0


def test_evaluations_come_at_their_steps_and_groups_are_written_down(ahead: JobConfig) -> None:
    evaluated = [line["step"] for line in read_metrics(ahead.run_dir) if "eval/accuracy" in line]
    assert evaluated == [0, 2, 4]
    assert [row.step for row in read_groups(ahead.run_dir)] == [1, 2, 3, 4]


@pytest.mark.soak
def test_an_overlapped_run_goes_on_where_it_ended(ray_cluster: str, job: Job) -> None:
    trained(job("overlap.max_policy_lag=1", "rl.steps=2"))
    longer = trained(job("overlap.max_policy_lag=1", "rl.steps=4"))
    assert [line["step"] for line in steps_of(longer)] == [1, 2, 3, 4]
    resume = newest(longer.run_dir)
    assert resume is not None and resume.step == 4
