"""A whole job on a Ray cluster: two samplers, every part real."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from actors import job as jobs
from actors.job import Outcome
from rlsys.config import JobConfig
from rlsys.errors import ClusterError, ConfigError, RunExistsError
from rlsys.run_state.jsonl import RECORD_KEYS, read_metrics, read_rollouts
from rlsys.tracking.progress import Progress

Job = Callable[..., JobConfig]


@pytest.fixture(scope="module")
def finished(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, Outcome]:
    from rlsys.config import parse_config
    from tests.ray.conftest import JOB

    overrides = [
        f"model.path={micro_base}",
        f"run.dir={tmp_path_factory.mktemp('runs')}",
        "sampler.num_workers=2",
        "rl.steps=3",
        "rl.loss.name=ppo",
        "rl.advantages.kl_coef=0.05",
        "rl.sampling.temperature=0.8",
        "tracking.wandb=offline",
    ]
    config = parse_config(JOB, overrides)
    return config, jobs.train(config, Progress())


def test_every_step_and_both_evaluations_are_written_down(finished: tuple[JobConfig, Outcome]) -> None:
    config, outcome = finished
    lines = read_metrics(config.run_dir)
    assert [line["step"] for line in lines if "reward/mean" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 3]
    assert outcome.steps == 3 and not outcome.interrupted


def test_every_metric_that_a_job_logs_is_documented(finished: tuple[JobConfig, Outcome]) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    logged = {name for line in read_metrics(finished[0].run_dir) for name in line} - set(RECORD_KEYS)
    general = {re.sub(r"^system/(?!driver_)\w+_memory_gb$", "system/NAME_memory_gb", name) for name in logged}
    assert sorted(name for name in general if f"`{name}`" not in documented) == []


def test_learner_and_two_samplers_agree_on_every_sampled_token(finished: tuple[JobConfig, Outcome]) -> None:
    steps = [line for line in read_metrics(finished[0].run_dir) if "reward/mean" in line]
    assert all(line["policy/logprob_diff_max"] < 1e-3 for line in steps), steps
    assert all(abs(line["policy/ratio_mean"] - 1) < 1e-3 for line in steps)


def test_the_policy_moves_and_each_version_is_attested_with_power(finished: tuple[JobConfig, Outcome]) -> None:
    steps = [line for line in read_metrics(finished[0].run_dir) if "reward/mean" in line]
    assert [line["policy/version"] for line in steps] == [1, 2, 3]
    assert all(line["sync/no_power"] == 0 for line in steps)
    assert all(line["sync/canary_new"] < line["sync/canary_previous"] for line in steps)
    assert all(line["policy/grad_norm"] > 0 for line in steps)


def test_the_kl_to_the_base_starts_at_zero_and_leaves_it(finished: tuple[JobConfig, Outcome]) -> None:
    kl = [line["policy/kl_reference"] for line in read_metrics(finished[0].run_dir) if "reward/mean" in line]
    assert abs(kl[0]) < 1e-3 < max(abs(value) for value in kl[1:])


def test_rollouts_are_kept_for_people_before_during_and_after(finished: tuple[JobConfig, Outcome]) -> None:
    rows = read_rollouts(finished[0].run_dir)
    assert {row.phase for row in rows} == {"before", "train", "after"}
    before, after = ([row.prompt for row in rows if row.phase == phase] for phase in ("before", "after"))
    assert before == after and all("How many" in prompt for prompt in before)


def test_the_saved_adapter_loads_in_peft_and_changes_the_base(
    finished: tuple[JobConfig, Outcome], micro_base: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(micro_base, dtype=torch.float32)
    ids = torch.arange(10).unsqueeze(0) + 5
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, finished[0].run_dir / "adapter")(ids).logits
    assert (plain - adapted).abs().max() > 1e-4


def test_the_report_and_the_offline_wandb_run_are_there(finished: tuple[JobConfig, Outcome]) -> None:
    config, outcome = finished
    html = (config.run_dir / "report.html").read_text()
    assert html.count("<svg") >= 5, "curves are drawn inline"
    assert outcome.wandb_dir and list(outcome.wandb_dir.glob("*.wandb"))


def test_no_actor_outlives_its_job(finished: tuple[JobConfig, Outcome], ray_cluster: str) -> None:
    ray.init(address=ray_cluster, log_to_driver=False)
    try:
        assert ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU")
    finally:
        ray.shutdown()


def test_a_finished_run_says_so_and_is_left_as_it_was(finished: tuple[JobConfig, Outcome]) -> None:
    config, outcome = finished
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    again = jobs.train(config, Progress())
    assert (again.steps, again.accuracy_after) == (outcome.steps, outcome.accuracy_after)
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_run_that_computes_something_else_is_refused_with_the_keys_and_the_ways_out(
    finished: tuple[JobConfig, Outcome],
) -> None:
    config, _ = finished
    other = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 2})})
    with pytest.raises(RunExistsError, match=r"lora\.rank was 4, is 2.*run\.name.*--fresh"):
        jobs.train(other, Progress())


def test_more_than_the_cluster_has_is_refused_before_anything_waits(ray_cluster: str, job: Job) -> None:
    with pytest.raises(ClusterError, match=r"101 CPU needed, 4 found, 97 too few.*sampler\.num_workers 200"):
        jobs.train(job("sampler.num_workers=200"), Progress())


def test_a_cluster_that_does_not_answer_is_named(job: Job) -> None:
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        jobs.train(job("cluster.address=127.0.0.1:1"), Progress())


def test_a_run_directory_that_is_no_run_is_left_alone(job: Job) -> None:
    config = job()
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "thesis.tex").write_text("dear")
    with pytest.raises(RunExistsError, match="no run of rlsys"):
        jobs.train(config, Progress(), fresh=True)
    assert (config.run_dir / "thesis.tex").read_text() == "dear"


def test_a_run_directory_that_cannot_be_written_is_named(job: Job) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir '/proc/nowhere'.*cannot be created or written: No such file"):
        jobs.train(job("run.dir=/proc/nowhere"), Progress())


def test_json_lines_of_a_run_are_plain_json(finished: tuple[JobConfig, Outcome]) -> None:
    lines = (finished[0].run_dir / "metrics.jsonl").read_text().splitlines()
    values = [value for line in lines for value in json.loads(line).values() if not isinstance(value, str)]
    assert np.isfinite([value for value in values if value is not None]).all()
