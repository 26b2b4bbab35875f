"""A run directory keeps the facts of a run between its drivers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path

import pytest
import yaml

from rlsys.client.config import ServiceConfig
from rlsys.config import JobConfig, RunSection, TrackingSection, dump_config
from rlsys.errors import ConfigError, RunExistsError
from rlsys.report.page import report_of
from rlsys.run_state.jsonl import read_metrics
from rlsys.run_state.run_dir import RunStore
from rlsys.run_state.run_info import day_of
from rlsys.run_state.saved_config import read_saved_config
from rlsys.tracking.tracker import Tracker
from tests.unit.run_state.run_stores import config, folders, saved


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
        with RunStore.open(job, note=lambda text: None) as store:
            assert store.config.prompt.date == "2026-02-03" == day_of(job.run_dir)
    with pytest.raises(RunExistsError, match=r"prompt\.date was '2026-02-03', is '2026-02-04'"):
        RunStore.open(config(tmp_path, "prompt.date=2026-02-04"))
    with RunStore.open(job, fresh=True, note=lambda text: None) as store:
        assert store.config.prompt.date == date.today().isoformat()


def test_a_run_of_an_rlsys_that_kept_no_day_has_that_of_its_start(tmp_path: Path) -> None:
    job = config(tmp_path)
    saved(job, 1)
    (job.run_dir / "config.yaml").write_text(dump_config(job))
    info = json.loads((job.run_dir / "run.json").read_text())
    noon = datetime(2026, 2, 3, 12).timestamp()
    (job.run_dir / "run.json").write_text(json.dumps({**info, "started": noon}))
    with RunStore.open(job, note=lambda text: None) as store:
        assert store.config.prompt.date == "2026-02-03"


def test_facts_outlive_the_driver(tmp_path: Path) -> None:
    with RunStore.open(config(tmp_path)) as store:
        store.note(cluster="10.0.0.1:6379")
        first = store.info
    with RunStore.open(config(tmp_path)) as store:
        assert store.info == first
        assert store.info["cluster"] == "10.0.0.1:6379" and store.info["wandb_id"]


def test_only_the_steps_asked_for_decide_whether_a_run_is_finished(tmp_path: Path) -> None:
    saved(config(tmp_path), 5, 6)
    with RunStore.open(config(tmp_path), note=lambda text: None) as store:
        assert store.finished
    with RunStore.open(config(tmp_path, "rl.steps=8"), note=lambda text: None) as store:
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
        RunStore.open(config(tmp_path, "rl.steps=3"), note=lambda text: None)
    with RunStore.open(config(tmp_path, "rl.steps=4"), note=lambda text: None) as store:
        assert store.finished


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


def test_a_run_of_an_rlsys_without_checkpoints_is_not_begun_again_over_its_figures(tmp_path: Path) -> None:
    saved(config(tmp_path), 1)
    (tmp_path / "kept" / "run.json").unlink()
    with pytest.raises(RunExistsError, match=r"no run\.json.*--fresh"):
        RunStore.open(config(tmp_path))


def test_a_directory_that_cannot_be_made_is_an_error_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir .*file.*cannot be created or written"):
        RunStore.open(config(tmp_path / "file"))


def test_a_base_is_kept_when_it_is_whole_and_made_again_when_it_is_not(tmp_path: Path) -> None:
    from rlsys.utils.packed_folder import pack_folder  # here, so that the drivers that import this module start fast

    job = config(tmp_path)
    notes: list[str] = []
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


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "what?", "{a,b}", "two words", "50%20", "a#b", "\xfc\u4e2d", "a::b"])
def test_the_path_of_a_run_is_no_pattern(tmp_path: Path, name: str) -> None:
    """Beside a folder that the pattern would match, and that is left as it is."""
    other = config(tmp_path / "exp1")
    saved(other, 1)
    job = config(tmp_path / name)
    saved(job, 1, 2)
    written = yaml.safe_load((job.run_dir / "config.yaml").read_text())
    tracking = TrackingSection(wandb="disabled", tensorboard=True)
    with Tracker(job.run_dir, tracking, "r", written, note=lambda text: None) as tracker:
        for step in (1, 2):
            tracker.log(step, {"reward/mean": 0.5})
        tracker.roll_back(1)
        tracker.log(2, {"reward/mean": 0.5})
    with RunStore.open(job, note=lambda text: None) as store:
        assert store.resume is not None and store.resume.step == 2
    assert [record["step"] for record in read_metrics(job.run_dir)] == [1, 2]
    assert report_of(job.run_dir).is_file()
    with RunStore.open(job, fresh=True, note=lambda text: None) as store:
        assert store.resume is None
    assert folders(other) == ["step-000001"]


def test_thread_counts_chosen_at_the_start_are_kept_when_the_run_is_resumed(tmp_path: Path) -> None:
    def choose(count: int) -> Callable[[JobConfig], JobConfig]:
        return lambda job: job.with_threads(count, count)

    job = config(tmp_path, "sampler.threads=3")
    with RunStore.open(job, complete=choose(2)) as store:
        assert (store.config.learner.threads, store.config.sampler.threads) == (2, 3)
    with RunStore.open(config(tmp_path), complete=choose(7)) as store:
        assert (store.config.learner.threads, store.config.sampler.threads) == (2, 3)
        assert read_saved_config(job.run_dir) == store.config  # as `rlsys replay` reads it
    with RunStore.open(config(tmp_path, "learner.threads=1"), note=lambda text: None) as store:
        assert (store.config.learner.threads, store.config.sampler.threads) == (1, 3)
    with RunStore.open(config(tmp_path), fresh=True, note=lambda text: None, complete=choose(7)) as store:
        assert (store.config.learner.threads, store.config.sampler.threads) == (7, 7)
