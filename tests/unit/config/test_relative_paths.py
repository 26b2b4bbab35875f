"""A relative path is of the folder in which the command was given, whichever process reads it, from anywhere."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from actors.cluster.base_folder import local_folder
from actors.reward_actor import RewardActor
from rlsys.client.paths import given
from rlsys.config import JobConfig, dump_config, load_command, load_config
from rlsys.config.relative_paths import resolve_path, resolve_paths
from rlsys.errors import ConfigError, RunExistsError
from rlsys.evaluation.policy_source import find_policy
from rlsys.run_state.changes import refuse_changes
from rlsys.run_state.run_dir import RunStore
from rlsys.run_state.run_info import folder_of_command
from tests.unit.tokenization.test_renderer import tokenizer_of

JOB = """
run: {name: a}
model: {path: models/base, max_length: 128}
task: {name: dataset, train: {path: data/train.jsonl}, eval: {path: ./data/eval.jsonl}, columns: {}}
"""


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[bool], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer, and rows for its tokens."""
    folder = tmp_path_factory.mktemp("with tokenizer") / "base"
    made = AutoModelForCausalLM.from_pretrained(tiny_model(True))
    made.resize_token_embeddings(300)
    made.save_pretrained(folder)
    tokenizer_of(None).save_pretrained(folder)
    return folder


@pytest.fixture
def project(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a command: model and data in it, and the process stands there."""
    folder = tmp_path / "my project $1"
    shutil.copytree(model, folder / "models" / "base")
    (folder / "data").mkdir()
    for split in ("train", "eval"):
        rows = [json.dumps({"question": f"{split} {i}", "answer": str(i)}) for i in range(3)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(rows))
    (folder / "job.yaml").write_text(JOB)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Where a cluster was started: it has other files of the same names."""
    folder = tmp_path / "cluster"
    (folder / "data").mkdir(parents=True)
    (folder / "models" / "base").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text('{"question": "wrong", "answer": "1"}')
    return folder


@pytest.fixture
def hub_names(project: Path) -> JobConfig:
    overrides = ["model.path=Qwen/Qwen3-0.6B", "task.train.path=openai/gsm8k", "task.eval.path=gpt2"]
    return load_command("job.yaml", overrides)


def as_sent(job: JobConfig) -> JobConfig:
    """What Ray makes of an argument."""
    found: JobConfig = pickle.loads(pickle.dumps(job))
    return found


def test_actors_in_another_folder_read_what_the_command_meant(
    project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resolve_paths(load_command("job.yaml"))
    monkeypatch.chdir(elsewhere)
    actor = RewardActor(as_sent(job))
    assert job.model.path is not None
    with local_folder(job.model.path) as folder:
        assert folder == project / "models" / "base"
    actor.start(job.model.path)
    assert [list(actor.problems(split).answers) for split in ("train", "eval")] == [["0", "1", "2"]] * 2
    assert actor.task_facts()["task/train_problems"] == 3.0
    assert actor.started is not None
    actor.started.pool.close()


@pytest.mark.parametrize("spelled", ["data", "./data", "data/", "../my project $1/data", "data/../data"])
def test_any_spelling_of_a_folder_that_is_there_is_anchored(project: Path, spelled: str) -> None:
    found = Path(resolve_path(spelled))
    assert found.is_absolute() and found.samefile(project / "data")


def test_a_link_is_kept_as_a_link(project: Path) -> None:
    (project / "today").symlink_to("data")
    assert resolve_path("today") == str(project / "today")


@pytest.mark.parametrize("name", ["openai/gsm8k", "gpt2", "Qwen/Qwen3-0.6B", "owner/my_data.v2"])
def test_a_name_on_the_hub_stays_a_name(project: Path, name: str) -> None:
    assert resolve_path(name) == name


@pytest.mark.parametrize("path", ["./base", "../base", "a/b/c", "a b", "exp[1]", ".cache", "a/", "data/new file.jsonl"])
def test_what_can_only_be_a_path_is_one_though_nothing_is_there(project: Path, path: str) -> None:
    assert resolve_path(path) == str(project / path)


def test_an_absolute_path_is_left_alone_though_only_other_machines_have_it(project: Path) -> None:
    assert resolve_path("/no such disk/base") == "/no such disk/base"


def test_a_folder_of_the_name_of_a_data_set_is_the_folder(hub_names: JobConfig, project: Path) -> None:
    assert hub_names.task.train is not None and resolve_paths(hub_names).model == hub_names.model
    (project / "openai" / "gsm8k").mkdir(parents=True)
    train = resolve_paths(hub_names).task.train
    assert train is not None and train.path == str(project / "openai" / "gsm8k")


def test_every_path_of_a_job_is_anchored(project: Path) -> None:
    (project / "runs").mkdir()
    found = resolve_paths(load_command("job.yaml")).model_dump()
    paths = [found["run"]["dir"], found["model"]["path"], found["task"]["train"]["path"], found["task"]["eval"]["path"]]
    assert paths == [str(project / name) for name in ("runs", "models/base", "data/train.jsonl", "data/eval.jsonl")]


def test_a_job_that_makes_its_base_and_its_problems_has_no_path_but_its_run(project: Path) -> None:
    job = load_command("job.yaml", ["model={make: {}}", "model.path=null", "task={name: arithmetic, train: null}"])
    job = job.model_copy(update={"task": job.task.model_copy(update={"train": None, "eval": None})})
    found = resolve_paths(job)
    assert found.run_dir == project / "runs" / "a"
    assert (found.model, found.task) == (job.model, job.task)


def test_an_evaluation_gives_actors_the_anchored_job_and_base(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = find_policy(load_command("job.yaml"), None)
    assert candidate.base == candidate.config.model.path == str(project / "models" / "base")
    assert candidate.config.task.train is not None
    assert candidate.config.task.train.path == str(project / "data" / "train.jsonl")


def test_a_saved_state_that_a_client_names_is_of_the_clients_folder(project: Path) -> None:
    assert given("states/x") == str(project / "states" / "x")
    assert given("rlsys://a/weights/x") == "rlsys://a/weights/x"


def test_a_run_keeps_the_paths_as_written_and_the_folder_beside_them(project: Path) -> None:
    with RunStore.open(load_command("job.yaml"), note=lambda text: None) as store:
        run = store.run_dir
    kept = load_config(run / "config.yaml")
    assert (
        kept.model.path == "models/base" and kept.task.eval is not None and kept.task.eval.path == "./data/eval.jsonl"
    )
    assert folder_of_command(run) == project


SPELLED = {
    "as before": (["task.train.path=data/train.jsonl"], True),
    "with a dot": (["task.train.path=./data/train.jsonl"], True),
    "absolute": (["task.train.path=HERE/data/train.jsonl", "model.path=HERE/models/base"], True),
    "by a link": (["model.path=linked"], True),
    "another file": (["task.train.path=data/eval.jsonl"], False),
    "another folder": (["model.path=models/other"], False),
    "a name on the Hub": (["model.path=models/none"], False),
}


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_run_goes_on_however_the_same_place_is_spelled(project: Path, spelled: str) -> None:
    overrides, same = SPELLED[spelled]
    (project / "linked").symlink_to("models/base")
    (project / "models" / "other").mkdir()
    with RunStore.open(load_command("job.yaml"), note=lambda text: None):
        pass
    here = str(project).replace("$", r"\$")
    job = load_command("job.yaml", [one.replace("HERE", here) for one in overrides])
    if same:
        refuse_changes(job, job.run_dir)
    else:
        with pytest.raises(RunExistsError, match=r"other settings: (model|task\.train)\.path was"):
            refuse_changes(job, job.run_dir)


def test_a_run_goes_on_from_another_folder_with_the_absolute_path_of_the_first(
    project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = str(project / "runs").replace("$", r"\$")
    with RunStore.open(load_command("job.yaml"), note=lambda text: None):
        pass
    monkeypatch.chdir(elsewhere)
    absolute = [
        f"{key}={project / name}".replace("$", r"\$")
        for key, name in {"model.path": "models/base", "task.train.path": "data/train.jsonl"}.items()
    ]
    job = load_command(project / "job.yaml", [f"run.dir={runs}", *absolute])
    with RunStore.open(job, note=lambda text: None) as store:
        assert folder_of_command(store.run_dir) == elsewhere


def test_a_run_that_kept_absolute_paths_goes_on_with_relative_ones_and_one_that_kept_no_folder_too(
    project: Path,
) -> None:
    here = str(project).replace("$", r"\$")
    with RunStore.open(load_command("job.yaml", [f"model.path={here}/models/base"]), note=lambda text: None) as store:
        run = store.run_dir
    refuse_changes(load_command("job.yaml"), run)
    info = json.loads((run / "run.json").read_text())
    del info["folder"]
    (run / "run.json").write_text(json.dumps(info))
    refuse_changes(load_command("job.yaml"), run)
    with RunStore.open(load_command("job.yaml"), note=lambda text: None) as store:
        assert store.info["folder"] == str(project)


def test_a_project_that_was_moved_goes_on(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunStore.open(load_command("job.yaml"), note=lambda text: None):
        pass
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    with RunStore.open(load_command("job.yaml"), note=lambda text: None) as store:
        job = resolve_paths(store.config, tmp_path / "my project $1", Path.cwd())
    assert job.model.path == str(tmp_path / "moved" / "models" / "base")


def test_an_anchored_job_with_odd_characters_is_written_and_read_as_the_same(project: Path) -> None:
    job = resolve_paths(load_command("job.yaml"))
    (project / "anchored.yaml").write_text(dump_config(job))
    assert load_config(project / "anchored.yaml") == job


def test_a_path_that_is_not_there_is_named_with_its_folder(
    project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resolve_paths(load_command("job.yaml", ["model.path=./base"]))
    monkeypatch.chdir(elsewhere)
    assert job.model.path is not None
    with pytest.raises(ConfigError) as error, local_folder(job.model.path):
        pass
    assert f"model.path: {str(project / 'base')!r} is not a folder on this node" in str(error.value)
