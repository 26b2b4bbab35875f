"""A run's directory survives the death of its driver at any point, and nothing in it is guessed or lost silently."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlsys.client.config import ServiceConfig
from rlsys.config import JobConfig, RunSection, TrackingSection, dump_config, load_config
from rlsys.data.problems import Epochs
from rlsys.errors import CheckpointError, ConfigError, RunExistsError
from rlsys.report.page import report_of
from rlsys.run_state.changes import FIXED, refuse_changes
from rlsys.run_state.jsonl import read_metrics
from rlsys.run_state.ledger import TRAINED, Ledger
from rlsys.run_state.resume import newest
from rlsys.run_state.run_dir import RunStore
from rlsys.run_state.run_info import day_of
from rlsys.tracking.tracker import Tracker

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
FILES = {"adapter_model.safetensors": b"weights" * 100, "optimizer.safetensors": b"moments" * 200, "a/b.json": b"{}"}


def config(folder: Path, *overrides: str) -> JobConfig:
    return load_config(QUICKSTART, ["run.name=kept", f"run.dir={folder}", "rl.steps=6", *overrides])


def ledger_at(step: int, job: JobConfig) -> Ledger:
    ledger = Ledger(Epochs(job.task.train_problems or 4096, job.rl.problems_per_step, job.run.seed))
    for done in range(1, step + 1):
        ledger.draw(done, job.rl.problems_per_step)
        ledger.settle(done, np.full(job.rl.problems_per_step, TRAINED))
    return ledger


def files_at(step: int) -> dict[str, bytes]:
    return {**FILES, "step.txt": str(step).encode()}


def saved(job: JobConfig, *steps: int) -> Path:
    """A run whose driver has saved these steps and ended."""
    with RunStore.open(job, note=str) as store:
        for step in steps:
            store.save(step, files_at(step), ledger_at(step, job))
    return job.run_dir / "checkpoints"


def folders(job: JobConfig) -> list[str]:
    return sorted(path.name for path in (job.run_dir / "checkpoints").iterdir())


def test_a_new_run_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    with RunStore.open(config(tmp_path)) as store:
        assert (store.resume, store.base, store.finished, store.latest()) == (None, None, False, None)
        written = yaml.safe_load((store.run_dir / "config.yaml").read_text())
        assert written == config(tmp_path).dated(date.today().isoformat()).model_dump(mode="json")
        assert store.config.prompt.date == date.today().isoformat()


def test_a_run_keeps_the_day_on_which_it_began(tmp_path: Path) -> None:
    """What is written at its start is what a driver of a later day computes with; a day of the job's own is fixed."""
    job = config(tmp_path)
    saved(job, 1)
    path = job.run_dir / "config.yaml"
    path.write_text(dump_config(job.dated("2026-02-03")))
    for _ in range(2):
        with RunStore.open(job, note=str) as store:
            assert store.config.prompt.date == "2026-02-03" == day_of(job.run_dir)
    with pytest.raises(RunExistsError, match=r"prompt\.date was '2026-02-03', is '2026-02-04'"):
        RunStore.open(config(tmp_path, "prompt.date=2026-02-04"))
    with RunStore.open(job, fresh=True, note=str) as store:
        assert store.config.prompt.date == date.today().isoformat()


def test_a_run_of_an_rlsys_that_kept_no_day_has_that_of_its_start(tmp_path: Path) -> None:
    job = config(tmp_path)
    saved(job, 1)
    (job.run_dir / "config.yaml").write_text(dump_config(job))
    info = json.loads((job.run_dir / "run.json").read_text())
    noon = datetime(2026, 2, 3, 12).timestamp()
    (job.run_dir / "run.json").write_text(json.dumps({**info, "started": noon}))
    with RunStore.open(job, note=str) as store:
        assert store.config.prompt.date == "2026-02-03"


def test_what_was_saved_comes_back_to_the_byte(tmp_path: Path) -> None:
    job = config(tmp_path)
    saved(job, 0, 1)
    with RunStore.open(job) as store:
        assert store.resume is not None
        assert (store.resume.step, store.resume.files, store.finished) == (1, files_at(1), False)
        assert store.resume.ledger == ledger_at(1, job).to_bytes()
        assert store.resume.path == tmp_path / "kept" / "checkpoints" / "step-000001"
        assert newest(job.run_dir) == store.resume == store.latest()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    job = config(tmp_path, "checkpoint.keep=3")
    saved(job, *range(6))
    assert folders(job) == ["step-000003", "step-000004", "step-000005"]


def test_the_same_step_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    job = config(tmp_path)
    with RunStore.open(job) as store:
        store.save(1, files_at(7), ledger_at(1, job))
        store.save(1, files_at(1), ledger_at(1, job).to_bytes())
        found = store.latest()
        assert found is not None and found.files == files_at(1)
    assert folders(job) == ["step-000001"]


def test_a_ledger_of_another_step_is_not_saved(tmp_path: Path) -> None:
    job = config(tmp_path)
    with RunStore.open(job) as store, pytest.raises(CheckpointError, match="step 2: found a ledger of step 1"):
        store.save(2, FILES, ledger_at(1, job))


def test_facts_outlive_the_driver(tmp_path: Path) -> None:
    with RunStore.open(config(tmp_path)) as store:
        store.note(address="10.0.0.1:6379")
        first = store.info
    with RunStore.open(config(tmp_path)) as store:
        assert store.info == first
        assert store.info["address"] == "10.0.0.1:6379" and store.info["wandb_id"]


def damage_resume_json(path: Path) -> None:
    body = json.loads((path / "resume.json").read_text())
    (path / "resume.json").write_text(json.dumps({**body, "step": 9}))


def flip(name: str) -> Any:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return damage


DAMAGES = {
    "a changed byte": flip("optimizer.safetensors"),
    "a ledger with a changed byte": flip("ledger.npz"),
    "a file cut short": lambda path: os.truncate(path / "adapter_model.safetensors", 10),
    "a missing file": lambda path: (path / "a/b.json").unlink(),
    "no resume.json": lambda path: (path / "resume.json").unlink(),
    "a torn resume.json": lambda path: os.truncate(path / "resume.json", 100),
    "an edited resume.json": damage_resume_json,
    "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
    "a renamed folder": lambda path: path.rename(path.with_name("step-000008")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before_and_the_user_is_told(
    tmp_path: Path, damage: Any
) -> None:
    job, notes = config(tmp_path), []
    damage(saved(job, 1, 2) / "step-000002")
    with RunStore.open(job, note=notes.append) as store:
        assert store.resume is not None and store.resume.step == 1
        assert any("step-00000" in note and "resuming from step 1 instead" in note for note in notes), notes
        store.save(2, files_at(2), ledger_at(2, job))
        store.save(3, files_at(3), ledger_at(3, job))
    assert [name for name in folders(job) if name.startswith("step")] == ["step-000002", "step-000003"]


def test_no_whole_checkpoint_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    job = config(tmp_path)
    for folder in saved(job, 1, 2).iterdir():
        (folder / "ledger.npz").unlink()
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints is intact.*ledger\.npz.*--fresh"):
        RunStore.open(job)
    with RunStore.open(job, fresh=True) as store:
        assert store.resume is None


def test_checkpoints_that_somebody_removed_are_missed(tmp_path: Path) -> None:
    job = config(tmp_path)
    folder = saved(job, 1)
    with Tracker(job.run_dir, config(tmp_path, "tracking.wandb=disabled").tracking, "r", {}, note=str) as tracker:
        tracker.log(1, {"reward/mean": 0.5})
    (job.run_dir / "config.yaml").write_text(dump_config(job))
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="found no checkpoint, but metrics of 1 steps"):
        RunStore.open(job)
    assert len(read_metrics(job.run_dir)) == 1


def test_a_run_that_died_before_its_first_checkpoint_begins_again_under_its_wandb_id(tmp_path: Path) -> None:
    with RunStore.open(config(tmp_path)) as first:
        pass
    with RunStore.open(config(tmp_path)) as second:
        assert second.resume is None and second.info == first.info


def test_only_the_steps_asked_for_decide_whether_a_run_is_finished(tmp_path: Path) -> None:
    saved(config(tmp_path), 5, 6)
    with RunStore.open(config(tmp_path), note=str) as store:
        assert store.finished
    with RunStore.open(config(tmp_path, "rl.steps=8"), note=str) as store:
        assert not store.finished


def test_more_steps_go_on_and_the_configuration_before_is_kept(tmp_path: Path) -> None:
    saved(config(tmp_path), 6)
    notes: list[str] = []
    for steps in (8, 9):
        with RunStore.open(config(tmp_path, f"rl.steps={steps}"), note=notes.append) as store:
            assert store.resume is not None and store.resume.step == 6
    kept = {path.name: yaml.safe_load(path.read_text())["rl"]["steps"] for path in store.run_dir.glob("config*.yaml")}
    assert kept == {"config.001.yaml": 6, "config.002.yaml": 8, "config.yaml": 9}
    assert "config.001.yaml" in notes[0]


def test_fewer_steps_than_are_done_are_refused_and_as_many_are_a_finished_run(tmp_path: Path) -> None:
    saved(config(tmp_path), 4)
    with pytest.raises(ConfigError, match=r"rl\.steps 3: .* is at step 4.*rl\.steps=4 or more.*--fresh"):
        RunStore.open(config(tmp_path, "rl.steps=3"), note=str)
    with RunStore.open(config(tmp_path, "rl.steps=4"), note=str) as store:
        assert store.finished


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.seed=5", "run.seed was "),
        ("lora.rank=4", "lora.rank was 16, is 4"),
        ("rl.optim.learning_rate=1e-5", "rl.optim.learning_rate was "),
        ("rl.loss.name=ppo", "rl.loss.name was 'importance_sampling', is 'ppo'"),
        ("rl.samples_per_problem=4", "rl.samples_per_problem was "),
        ("task.train_problems=64", "task.train_problems was "),
        ("model.make.num_layers=2", "model.make.num_layers was "),
        ("rewards.function=a.b:c", "rewards.function was None, is 'a.b:c'"),
        ("eval.max_tokens=40", "eval.max_tokens was 56, is 40"),
        ("rl.loss={name: ppo, params: {clip_low_threshold: 0.9}}", "rl.loss.params was {}, is {'clip_low_threshold'"),
    ],
)
def test_a_change_of_what_the_run_computes_is_refused_by_key_and_both_values(
    tmp_path: Path, override: str, told: str
) -> None:
    saved(config(tmp_path), 1)
    before = (tmp_path / "kept" / "config.yaml").read_bytes()
    with pytest.raises(RunExistsError) as refused:
        RunStore.open(config(tmp_path, override))
    assert told in str(refused.value)
    assert "run.name=" in str(refused.value) and "--fresh" in str(refused.value)
    assert (tmp_path / "kept" / "config.yaml").read_bytes() == before
    RunStore.open(config(tmp_path)).close()  # the refused driver holds no lock


@pytest.mark.parametrize(
    "override", ["learner.num_workers=2", "sampler.num_workers=3", "eval.every_steps=2", "checkpoint.keep=5"]
)
def test_where_a_run_is_computed_may_change(tmp_path: Path, override: str) -> None:
    saved(config(tmp_path), 1)
    with RunStore.open(config(tmp_path, override), note=str) as store:
        assert store.resume is not None


def test_a_configuration_of_an_older_rlsys_is_compared_by_the_keys_that_both_have(tmp_path: Path) -> None:
    job = config(tmp_path)
    saved(job, 1)
    path = job.run_dir / "config.yaml"
    old = yaml.safe_load(path.read_text())
    old["run"]["stage_timeout_s"] = 600.0  # a key that is gone
    old["gone"] = {"section": {"key": 1}}
    del old["checkpoint"], old["task"]["eval_seed"]  # keys that are new
    path.write_text(yaml.safe_dump(old))
    refuse_changes(job, job.run_dir)
    path.write_text("run: [")
    with pytest.raises(RunExistsError, match="no configuration that this rlsys can read"):
        refuse_changes(job, job.run_dir)


def test_every_key_that_is_fixed_is_one_of_a_job() -> None:
    flat = dump_config(config(Path("/nowhere")))
    assert all(f"{key.split('.')[0]}:" in flat for key in FIXED)


def test_a_folder_that_is_no_run_is_left_alone_with_fresh_too(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.tex").write_text("")
    for fresh in (False, True):
        with pytest.raises(RunExistsError, match=r"thesis\.tex.*no run of rlsys"):
            RunStore.open(config(tmp_path), fresh)
    assert os.listdir(tmp_path / "kept") == ["thesis.tex"]


NO_NAMES = [
    ".",
    "..",
    "",
    "/",
    "a/b",
    "../a",
    "/tmp/a",
    "a\n",
    "\na",
    "a\0b",
    "-rf",
    ".hidden",
    "a b",
    "~",
    "$HOME",
    "a" * 129,
]


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_a_run_name_is_one_folder_of_run_dir(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name: found .*and no path"):
        config(tmp_path, f"run.name={json.dumps(name)}")
    with pytest.raises(ValueError, match="and no path"):
        RunSection(name=name)
    with pytest.raises(ValueError, match="and no path"):
        ServiceConfig(detached=name)


def foreign(folder: Path, config_text: str = "") -> Path:
    """A folder of somebody's work."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thesis.tex").write_text("")
    if config_text:
        (folder / "config.yaml").write_text(config_text)
    return folder


NO_RUNS = [
    "defaults: [a]\nmodel: x\n",
    "run: {name: a}\n",
    "run: {name: a}\nmodel: {}\ndata: {}\n",
    "- run\n- model\n",
    "run: [",
    "run: name\nmodel: y\n",
    "\0",
]


@pytest.mark.parametrize("text", NO_RUNS)
def test_fresh_removes_nothing_where_another_program_has_its_config_yaml(tmp_path: Path, text: str) -> None:
    folder = foreign(tmp_path / "kept", text)
    for fresh in (False, True):
        with pytest.raises(RunExistsError, match=r"config\.yaml.*no run of rlsys"):
            RunStore.open(config(tmp_path), fresh)
    assert sorted(os.listdir(folder)) == ["config.yaml", "thesis.tex"]


def test_fresh_leaves_what_somebody_else_put_into_a_run(tmp_path: Path) -> None:
    saved(config(tmp_path), 1)
    foreign(tmp_path / "kept" / "notes")
    foreign(tmp_path / "kept")
    said: list[str] = []
    RunStore.open(config(tmp_path), fresh=True, note=said.append).close()
    assert sorted(os.listdir(tmp_path / "kept")) == ["config.yaml", "lock", "notes", "run.json", "thesis.tex"]
    assert os.listdir(tmp_path / "kept" / "notes") == ["thesis.tex"]
    assert any("keeps files that rlsys did not write: notes, thesis.tex" in line for line in said)
    RunStore.open(config(tmp_path)).close()


def test_fresh_removes_nothing_through_a_link_in_place_of_the_run(tmp_path: Path) -> None:
    saved(config(tmp_path / "other"), 1)
    (tmp_path / "kept").symlink_to(tmp_path / "other" / "kept")
    with pytest.raises(RunExistsError, match=r"is a symbolic link to .*other/kept"):
        RunStore.open(config(tmp_path), fresh=True)
    RunStore.open(config(tmp_path)).close()
    assert (tmp_path / "kept" / "checkpoints" / "step-000001").is_dir()


@pytest.mark.parametrize(
    "name", ["checkpoints", "base", "adapter", "steps", "wandb", "eval", ".base.old", "config.001.yaml"]
)
def test_fresh_removes_a_link_and_not_what_it_points_to(tmp_path: Path, name: str) -> None:
    saved(config(tmp_path), 1)
    elsewhere, link = foreign(tmp_path / "elsewhere"), tmp_path / "kept" / name
    if link.is_dir():
        shutil.rmtree(link)
    link.symlink_to(elsewhere)
    RunStore.open(config(tmp_path), fresh=True).close()
    assert not link.is_symlink()
    assert os.listdir(elsewhere) == ["thesis.tex"]


@pytest.mark.parametrize(
    "name", ["checkpoints/step-000001", "checkpoints/damaged-step-000003", "checkpoints/.step-000003.x"]
)
def test_a_run_that_goes_on_removes_links_and_not_what_they_point_to(tmp_path: Path, name: str) -> None:
    saved(config(tmp_path), 1, 2, 3)
    elsewhere, link = foreign(tmp_path / "elsewhere"), tmp_path / "kept" / name
    if link.is_dir():
        shutil.rmtree(link)
    link.symlink_to(elsewhere)
    (tmp_path / "kept" / "checkpoints" / "step-000003" / "resume.json").write_text("")
    saved(config(tmp_path), 4, 5)
    assert os.listdir(elsewhere) == ["thesis.tex"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    saved(config(tmp_path), 1)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "kept" / "lock").unlink()
    (tmp_path / "kept" / "lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="symbolic links"):
        RunStore.open(config(tmp_path), fresh=True)
    assert victim.read_text() == "precious"


def test_a_run_with_a_damaged_configuration_is_one_by_its_run_json(tmp_path: Path) -> None:
    saved(config(tmp_path), 1)
    (tmp_path / "kept" / "config.yaml").write_text("run: [")
    with pytest.raises(RunExistsError, match=r"no configuration that this rlsys can read.*--fresh"):
        RunStore.open(config(tmp_path))
    RunStore.open(config(tmp_path), fresh=True).close()
    assert not (tmp_path / "kept" / "checkpoints").exists()


def test_fresh_leaves_nothing_of_the_run_before(tmp_path: Path) -> None:
    saved(config(tmp_path), 1)
    (tmp_path / "kept" / "metrics.jsonl").write_text("{}\n")
    old = json.loads((tmp_path / "kept" / "run.json").read_text())
    with RunStore.open(config(tmp_path, "lora.rank=2"), fresh=True) as store:
        assert store.resume is None and store.info["wandb_id"] != old["wandb_id"]
    assert sorted(os.listdir(tmp_path / "kept")) == ["config.yaml", "lock", "run.json"]


def test_a_run_of_an_rlsys_without_checkpoints_is_not_begun_again_over_its_figures(tmp_path: Path) -> None:
    saved(config(tmp_path), 1)
    (tmp_path / "kept" / "run.json").unlink()
    with pytest.raises(RunExistsError, match=r"no run\.json.*--fresh"):
        RunStore.open(config(tmp_path))


def test_a_directory_that_cannot_be_made_is_an_error_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir .*file.*cannot be created or written"):
        RunStore.open(config(tmp_path / "file"))


def test_a_second_driver_is_refused_and_told_who_is_at_work(tmp_path: Path) -> None:
    with RunStore.open(config(tmp_path)):
        for fresh in (False, True):
            with pytest.raises(RunExistsError, match=rf"process {os.getpid()} on .*since"):
                RunStore.open(config(tmp_path), fresh)
    RunStore.open(config(tmp_path)).close()


DRIVER = """
import pathlib, subprocess, sys
sys.path.insert(0, {here!r})
from tests.unit.run_state.test_run_dir import config, files_at, ledger_at
from rlsys.report.page import report_of
from rlsys.run_state.run_dir import RunStore
job = config(pathlib.Path({folder!r}), "checkpoint.keep=1", "rl.steps=5000", "rl.problems_per_step=2")
store = RunStore.open(job)
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
first = store.resume.step + 1 if store.resume else 1
ledger = ledger_at(first - 1, job)
for step in range(first, first + 200):
    ledger.draw(step, 2)
    ledger.settle(step, [2, 2])
    store.save(step, {{**files_at(step), "big": bytes([step % 256]) * 300_000}}, ledger)
    print(step, flush=True)
"""


def test_a_driver_killed_while_it_saves_leaves_a_whole_checkpoint_and_a_free_lock(tmp_path: Path) -> None:
    code = DRIVER.format(here=str(Path(__file__).parents[3]), folder=str(tmp_path))
    random = np.random.default_rng(0)
    reached = 0
    for _ in range(2):
        driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        sleeper = int(driver.stdout.readline())
        for _ in range(5):
            reached = int(driver.stdout.readline())
        time.sleep(random.uniform(0, 0.05))
        driver.kill()
        reached = max([reached, *map(int, driver.stdout.read().split())])
        driver.wait()
        os.kill(sleeper, 0)  # what the driver has started is still there, and does not hold the lock
        notes: list[str] = []
        job = config(tmp_path, "checkpoint.keep=1", "rl.steps=5000", "rl.problems_per_step=2")
        with RunStore.open(job, note=notes.append) as store:
            assert store.resume is not None and store.resume.step in (reached, reached + 1)
            assert store.resume.files["big"] == bytes([store.resume.step % 256]) * 300_000
            Ledger.from_bytes(store.resume.ledger, ledger_at(0, job)._epochs).audit()
            reached = store.resume.step
        os.kill(sleeper, signal.SIGKILL)
        assert [name for name in folders(job) if name.startswith(".")] == []


def test_what_a_writer_left_half_done_is_put_right_and_told(tmp_path: Path) -> None:
    job, notes = config(tmp_path), []
    folder = saved(job, 1, 2)
    (folder / ".step-000003.x8y").mkdir()
    (folder / ".step-000003.x8y" / "ledger.npz").write_bytes(b"half")
    (folder / "step-000002").rename(folder / ".step-000002.old")  # died between the two renames of a replacement
    (job.run_dir / ".config.yaml.new").write_text("half")
    with RunStore.open(job, note=notes.append) as store:
        assert store.resume is not None and store.resume.step == 2
    assert folders(job) == ["step-000001", "step-000002"]
    assert len(notes) == 2 and all("left incomplete by a driver that died" in note for note in notes)


def test_a_driver_that_died_before_it_wrote_the_configuration_leaves_no_obstacle(tmp_path: Path) -> None:
    RunStore.open(config(tmp_path)).close()
    (tmp_path / "kept" / "config.yaml").unlink()
    with RunStore.open(config(tmp_path)) as store:
        assert store.resume is None


def test_a_base_is_kept_when_it_is_whole_and_made_again_when_it_is_not(tmp_path: Path) -> None:
    from rlsys.modeling.base_model import pack_folder  # here, so that the drivers that import this module start fast

    job, notes = config(tmp_path), []
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.safetensors").write_bytes(b"base")
    with RunStore.open(job) as store:
        assert store.put("base", pack_folder(tmp_path / "made")) == store.base
    with RunStore.open(job) as store:
        assert store.base == tmp_path / "kept" / "base"
    (tmp_path / "kept" / "base" / "model.safetensors").write_bytes(b"bass")
    with RunStore.open(job, note=notes.append) as store:
        assert store.base is None and not (tmp_path / "kept" / "base").exists()
    assert "trained again" in notes[0]


def test_a_folder_put_again_holds_the_new_files_and_no_old_one(tmp_path: Path) -> None:
    with RunStore.open(config(tmp_path)) as store:
        store.put("adapter", {"a": b"1", "b": b"2"})
        before = (store.run_dir / "adapter" / "a").stat().st_ino
        store.put("adapter", {"a": b"1", "b": b"2"})
        assert (store.run_dir / "adapter" / "a").stat().st_ino == before, "an equal one is left"
        store.put("adapter", {"a": b"3"})
        assert (store.run_dir / "adapter" / "a").read_bytes() == b"3"
        assert os.listdir(store.run_dir / "adapter") == ["a"]


def test_a_disk_without_room_is_an_error_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    job = config(tmp_path)
    saved(job, 1)
    code = (
        "import resource, pathlib, sys, signal\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "from tests.unit.run_state.test_run_dir import *\n"
        f"job = config(pathlib.Path({str(tmp_path)!r}))\n"
        "store = RunStore.open(job)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: store.save(2, {'big': bytes(100_000)}, ledger_at(2, job))\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "step-000002: cannot be written: File too large" in done.stdout
    assert folders(job) == ["step-000001"]


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "what?", "{a,b}", "two words", "50%20", "a#b", "\xfc\u4e2d", "a::b"])
def test_the_path_of_a_run_is_no_pattern(tmp_path: Path, name: str) -> None:
    """Beside a folder that the pattern would match, and that is left as it is."""
    other = config(tmp_path / "exp1")
    saved(other, 1)
    job = config(tmp_path / name)
    saved(job, 1, 2)
    written = yaml.safe_load((job.run_dir / "config.yaml").read_text())
    tracking = TrackingSection(wandb="disabled", tensorboard=True)
    with Tracker(job.run_dir, tracking, "r", written, note=str) as tracker:
        for step in (1, 2):
            tracker.log(step, {"reward/mean": 0.5})
        tracker.roll_back(1)
        tracker.log(2, {"reward/mean": 0.5})
    with RunStore.open(job, note=str) as store:
        assert store.resume is not None and store.resume.step == 2
    assert [record["step"] for record in read_metrics(job.run_dir)] == [1, 2]
    assert report_of(job.run_dir).is_file()
    with RunStore.open(job, fresh=True, note=str) as store:
        assert store.resume is None
    assert folders(other) == ["step-000001"]
