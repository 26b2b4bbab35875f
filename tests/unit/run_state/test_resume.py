"""A run is resumed from its newest intact checkpoint, and damage is found and reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import dump_config
from rlsys.errors import CheckpointError
from rlsys.run_state.jsonl import read_metrics
from rlsys.run_state.ledger import Ledger
from rlsys.run_state.resume import newest
from rlsys.run_state.run_dir import RunStore
from rlsys.tracking.tracker import Tracker
from tests.unit.run_state.run_stores import FILES, config, files_at, folders, ledger_at, saved


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


def damage_resume_json(path: Path) -> None:
    body = json.loads((path / "resume.json").read_text())
    (path / "resume.json").write_text(json.dumps({**body, "step": 9}))


def flip(name: str) -> Any:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return damage


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGES = {
    "a changed byte": flip("optimizer.safetensors"),
    "a ledger with a changed byte": flip("ledger.npz"),
    "a file cut short": lambda path: os.truncate(path / "adapter_model.safetensors", 10),
    "a missing file": lambda path: (path / "a/b.json").unlink(),
    "no resume.json": lambda path: (path / "resume.json").unlink(),
    "a torn resume.json": lambda path: os.truncate(path / "resume.json", 100),
    "an edited resume.json": damage_resume_json,
    "an empty folder": emptied,
    "a renamed folder": lambda path: path.rename(path.with_name("step-000008")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before_and_the_user_is_told(
    tmp_path: Path, damage: Any
) -> None:
    job = config(tmp_path)
    notes: list[str] = []
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
    tracking = config(tmp_path, "tracking.wandb=disabled").tracking
    with Tracker(job.run_dir, tracking, "r", {}, note=lambda text: None) as tracker:
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


DRIVER = """
import pathlib, subprocess, sys
sys.path.insert(0, {here!r})
from tests.unit.run_state.run_stores import config, files_at, ledger_at
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


def test_a_disk_without_room_is_an_error_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    job = config(tmp_path)
    saved(job, 1)
    code = (
        "import resource, pathlib, sys, signal\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "from rlsys.errors import CheckpointError\n"
        "from rlsys.run_state.run_dir import RunStore\n"
        "from tests.unit.run_state.run_stores import config, ledger_at\n"
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
