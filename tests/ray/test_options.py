"""The algorithm's options in a real job: each is heard, and a run with all of them is gone on with exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from actors import job as jobs
from rlsys.config import JobConfig, parse_config
from rlsys.run_state.jsonl import read_metrics
from rlsys.tracking.progress import Progress
from tests.ray.conftest import JOB

Job = Callable[..., JobConfig]

# each that does not contradict another
OPTIONS = [
    "rl.substeps=2",
    "rl.loss.name=ppo",
    "rl.loss.params={clip_low_threshold: 0.8, clip_high_threshold: 1.28}",
    "rl.loss.importance_cap=2.0",
    "rl.advantages.baseline=leave_one_out",
    "rl.advantages.normalise=std",
    "rl.advantages.aggregate=length",
    "rl.advantages.kl_coef=0.1",
    "rl.advantages.kl_discount=0.5",
    "rl.advantages.reference_refresh_steps=1",
    "rl.overlong={handling: penalty, buffer_tokens: 6, penalty: 0.5}",
    "rl.optim={learning_rate: 1.0e-2, warmup_steps: 1, schedule: cosine, decay_steps: 10, final_share: 0.1}",
    "rewards.format=0.2",
    "rewards.format_pattern='[0-9]'",
    "rewards.length=0.1",
    "eval={every_steps: 1, max_tokens: 12, samples: 4, pass_k: [1, 4]}",
    "tracking.tensorboard=true",
]


def steps_of(config: JobConfig) -> list[dict[str, float]]:
    return [line for line in read_metrics(config.run_dir) if "reward/mean" in line]


@pytest.fixture(scope="module")
def straight(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    place = [f"model.path={micro_base}", f"run.dir={tmp_path_factory.mktemp('options')}"]
    config = parse_config(JOB, [*OPTIONS, *place, "rl.steps=3"])
    assert jobs.train(config, Progress()).steps == 3
    return config


def test_every_term_of_the_reward_has_a_curve(straight: JobConfig) -> None:
    for line in steps_of(straight):
        terms = [line[f"reward/{name}"] for name in ("correct", "format", "length", "overlong")]
        assert line["reward/mean"] == pytest.approx(sum(terms), abs=1e-6)
        assert line["reward/overlong"] < 0


def test_substeps_schedule_and_clips_reach_the_learner(straight: JobConfig) -> None:
    lines = steps_of(straight)
    assert [line["policy/version"] for line in lines] == [2, 4, 6]
    rates = [line["policy/learning_rate"] for line in lines]
    assert rates == [pytest.approx(straight.rl.optim.at(step, 3).learning_rate) for step in range(3)]
    assert rates[0] == pytest.approx(1e-2) and rates[2] < rates[1] < rates[0]
    assert any(line["policy/ratio_max"] > 1.001 for line in lines), "the second substep is off policy"


def test_the_reference_is_the_policy_of_one_step_ago(straight: JobConfig) -> None:
    assert all(abs(line["policy/kl_reference"]) < 1e-3 for line in steps_of(straight))


def test_pass_at_k_is_evaluated_beside_greedy_accuracy(straight: JobConfig) -> None:
    lines = [line for line in read_metrics(straight.run_dir) if "eval/accuracy" in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["eval/pass_at_1"] <= line["eval/pass_at_4"] for line in lines)
    assert all(line["eval/accuracy_low"] <= line["eval/accuracy"] <= line["eval/accuracy_high"] for line in lines)


def test_event_files_for_tensorboard_are_written(straight: JobConfig) -> None:
    assert list((straight.run_dir / "tensorboard" / "rl").glob("events.out.tfevents.*"))


@pytest.mark.soak
def test_a_run_with_all_options_that_is_gone_on_with_equals_one_that_was_not_interrupted(
    straight: JobConfig, job: Job
) -> None:
    for steps in (2, 3):
        config = job(*OPTIONS, f"rl.steps={steps}")
        assert jobs.train(config, Progress()).steps == steps
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (config.run_dir / weights).read_bytes() == (straight.run_dir / weights).read_bytes()


@pytest.mark.soak
def test_groups_that_agree_are_replaced_by_further_problems(ray_cluster: str, job: Job) -> None:
    config = job("rl.refill_rounds=2", "rl.steps=2", "rewards.function=tests.ray.graders:half_agree")
    jobs.train(config, Progress())
    lines = steps_of(config)
    assert all(4 <= line["reward/groups"] <= 12 for line in lines)
    assert all(line["reward/groups"] - line["reward/agreeing_groups"] <= 4 for line in lines)
    assert any(line["reward/agreeing_groups"] > 0 and line["reward/groups"] > 4 for line in lines)
