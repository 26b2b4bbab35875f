"""--fresh and a resumed driver change files that rlsys wrote, and no others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rlsys.errors import RunExistsError
from rlsys.run_state.run_dir import RunStore
from tests.unit.run_state.run_stores import config, folders, saved


def test_a_folder_that_is_no_run_is_left_alone_with_fresh_too(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.tex").write_text("")
    for fresh in (False, True):
        with pytest.raises(RunExistsError, match=r"thesis\.tex.*no run of rlsys"):
            RunStore.open(config(tmp_path), fresh)
    assert os.listdir(tmp_path / "kept") == ["thesis.tex"]


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


def test_what_a_writer_left_half_done_is_put_right_and_told(tmp_path: Path) -> None:
    job = config(tmp_path)
    notes: list[str] = []
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
