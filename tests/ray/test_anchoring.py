"""On a cluster that was started in another folder, relative paths are of the folder in which the command is given."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import ray

from actors import job as jobs
from actors.evaluation import evaluate
from rlsys import tasks
from rlsys.config import load_command, load_config, parse_config
from rlsys.evaluation.policy_source import find_policy
from rlsys.replay.replay_step import replay
from rlsys.tracking.progress import Progress
from tests.ray.conftest import JOB

RELATIVE = [
    "run.dir=runs",
    "model.path=models/base",
    "task={name: dataset, train: {path: data/train.jsonl}, eval: {path: ./data/eval.jsonl}, columns: {}}",
    "rl.steps=1",
    "tracking.wandb=disabled",
]


def folder_of_actors() -> str:
    return os.getcwd()


def test_a_job_with_relative_paths_is_trained_evaluated_and_replayed(
    ray_cluster: str, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(micro_base, tmp_path / "models" / "base")
    (tmp_path / "data").mkdir()
    task = tasks.build(parse_config(JOB, ["model.path=x"]).task, 0)
    for split in ("train", "eval"):
        rows = [json.dumps({"question": p.prompt, "answer": p.answer}) for p in task.problems(split)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "job.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    job = load_command("job.yaml", RELATIVE)
    outcome = jobs.train(job, Progress())
    assert outcome.steps == 1
    kept = load_config(outcome.run_dir / "config.yaml")
    assert kept.model.path == "models/base"
    saved = json.loads((tmp_path / "runs" / "micro" / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "models" / "base")
    record = evaluate(job, find_policy(job, Path("runs/micro")), Progress())
    assert len(record.problems) == 8
    ray.init(ray_cluster)
    try:
        assert ray.get(ray.remote(folder_of_actors).remote()) != str(tmp_path)
    finally:
        ray.shutdown()
    monkeypatch.chdir("/")
    found = replay(tmp_path / "runs" / "micro", 1)
    assert not found.differing(1e-5)
