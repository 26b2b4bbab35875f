"""One job on a data set of the user's, by relative paths, on a cluster that was started in another folder.

Its completions are cut off after a token, which it has to say.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from rich.console import Console

from actors import job as jobs
from actors.evaluation import evaluate
from rlsys import tasks
from rlsys.config import JobConfig, load_command, load_config, parse_config
from rlsys.errors import RunExistsError
from rlsys.evaluation.policy_source import find_policy
from rlsys.replay.replay_step import replay
from rlsys.run_state.jsonl import read_metrics
from rlsys.tracking.progress import Progress
from tests.ray.conftest import JOB

STEPS = 4
RELATIVE = [
    "run.dir=runs",
    "model.path=models/base",
    "task={name: dataset, train: {path: data/train.jsonl}, eval: {path: ./data/eval.jsonl},"
    " columns: {prompt: ask, answer: say}}",
    "rl.problems_per_step=8",
    "rl.sampling.max_tokens=1",
]


@dataclass(frozen=True)
class Finished:
    folder: Path  # in which the commands are given
    config: JobConfig
    run_dir: Path  # as the job tells it
    said: str

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "micro"


@pytest.fixture(scope="module")
def finished(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The commands' folder stays the working directory."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(micro_base, folder / "models" / "base")
    (folder / "data").mkdir()
    task = tasks.build(parse_config(JOB, ["model.path=x"]).task, 0)
    for split in ("train", "eval"):
        rows = [json.dumps({"ask": p.prompt, "say": p.answer}) for p in task.problems(split)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(rows))
    (folder / "job.yaml").write_text(JOB)
    terminal = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        job = load_command("job.yaml", [*RELATIVE, f"rl.steps={STEPS}"])
        outcome = jobs.train(job, Progress(Console(file=terminal, width=80)))
        assert outcome.steps == STEPS
        yield Finished(folder, job, outcome.run_dir, terminal.getvalue())


def folder_of_actors() -> str:
    return os.getcwd()


def test_a_job_with_relative_paths_is_trained_evaluated_and_replayed(
    finished: Finished, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = load_config(finished.run_dir / "config.yaml")
    assert kept.model.path == "models/base"
    saved = json.loads((finished.run / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(finished.folder / "models" / "base")
    record = evaluate(finished.config, find_policy(finished.config, Path("runs/micro")), Progress())
    assert len(record.problems) == 8
    ray.init(ray_cluster)
    try:
        assert ray.get(ray.remote(folder_of_actors).remote()) != str(finished.folder)
    finally:
        ray.shutdown()
    monkeypatch.chdir("/")
    found = replay(finished.run, 1)
    assert not found.differing(1e-5)


def test_a_job_whose_completions_are_all_cut_off_says_so_once_with_the_key_and_at_the_top_of_its_report(
    finished: Finished,
) -> None:
    text = "completions were cut off before their end. Raise rl.sampling.max_tokens (now 1)"
    assert finished.said.count(text) == 1, finished.said
    report = (finished.run / "report.html").read_text()
    assert 0 < report.index("completions were cut off before their end") < report.index("<svg")


def test_a_run_on_a_data_set_of_the_users_refuses_to_go_on_once_its_problems_have_changed(finished: Finished) -> None:
    metrics = next(line for line in read_metrics(finished.run) if "task/train_problems" in line)
    assert (metrics["task/train_problems"], metrics["task/eval_problems"]) == (32, 8)
    data = finished.folder / "data" / "train.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["say"] = "1000"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RunExistsError, match="the training problems are not those that this run began with"):
        jobs.train(load_command("job.yaml", [*RELATIVE, f"rl.steps={STEPS + 1}"]), Progress())
