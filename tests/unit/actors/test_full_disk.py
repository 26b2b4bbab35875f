"""Claims about a disk that takes no more: the cause is one line, and what fails while closing does not hide it."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.faults.actor_logs import Failures
from actors.job import _results, save_adapter
from rlsys.config import TrackingSection
from rlsys.errors import CheckpointError, StorageError
from rlsys.run_state.jsonl import METRICS
from rlsys.tracking.tracker import Tracker
from rlsys.utils.atomic_files import refusal

FULL = Path("/dev/full")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG])
def test_what_a_disk_refuses_is_one_line_with_the_place(number: int, tmp_path: Path) -> None:
    said = refusal(OSError(number, os.strerror(number)), tmp_path)
    assert said is not None and str(tmp_path) in said and "run.dir" in said and "\n" not in said
    assert "a file" in str(refusal(OSError(number, "no", "a file"), tmp_path))


def test_what_is_no_disks_refusal_is_left_alone(tmp_path: Path) -> None:
    assert refusal(ConnectionResetError(errno.ECONNRESET, "reset"), tmp_path) is None


def failing_store(tmp_path: Path) -> Any:
    """A store whose folder has become a file since, so that neither adapter nor report can be written."""
    (tmp_path / "run").write_text("")

    def latest() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    return SimpleNamespace(run_dir=tmp_path / "run", latest=latest)


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        (CheckpointError("step 3: cannot be written"), CheckpointError, "step 3: cannot be written"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "No space left on device"),
        (ValueError("a fault of ours"), ValueError, "a fault of ours"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_results_that_cannot_be_written_are_told_beside_the_cause(
    cause: BaseException, kind: type[BaseException], said: str, tmp_path: Path
) -> None:
    notes: list[str] = []
    with pytest.raises(kind) as caught, _results(failing_store(tmp_path), Failures(), notes.append):
        raise cause
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [("adapter" in note, "report" in note) for note in notes] == [(True, False), (False, True)]


def test_results_that_cannot_be_written_are_the_cause_where_nothing_else_failed(tmp_path: Path) -> None:
    store = failing_store(tmp_path)
    results = _results(store, Failures(), lambda text: None)
    with pytest.raises(StorageError, match="No space left"), results:
        save_adapter(store)


def test_an_error_log_that_cannot_be_written_does_not_hide_the_error() -> None:
    failures = Failures(FULL)
    failures.add("learner", CheckpointError("the cause"))
    assert "the cause" in failures.first()


def test_figures_that_the_disk_refuses_end_the_run_with_that_and_close_every_file(tmp_path: Path) -> None:
    notes: list[str] = []
    with pytest.raises(OSError, match="No space left"):  # noqa: SIM117, PT012
        with Tracker(tmp_path, TrackingSection(wandb="disabled"), "x", {}, note=notes.append) as tracker:
            tracker._files[METRICS].close()
            tracker._files[METRICS] = FULL.open("w")
            tracker.log(1, {"reward/mean": 0.5})
    assert all(file.closed for file in tracker._files.values())
    assert any("cannot be closed" in note for note in notes)


def test_a_command_whose_file_outgrows_the_limit_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    done = subprocess.run(
        [sys.executable, "-m", "rlsys", "report", str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("StorageError: ") and len(done.stderr.splitlines()) == 1
