"""A run's directory while one driver writes it. `resume.py` says where a run is resumed.

    config.yaml      the settings of the run; config.001.yaml, ... are those before each allowed change.
                     prompt.date is the day on which the run began: a chat template that writes the date keeps
                     writing that day, so prompts do not change at midnight. learner.threads and sampler.threads are
                     those that were chosen when the run began
    run.json         what outlives a driver (run_info.py)
    lock             held by the running driver (lock.py)
    checkpoints/     one folder per kept step (resume.py)
    base/, adapter/  folders that are replaced atomically
    metrics.jsonl, rollouts.jsonl, environment.json, wandb/, report.html    written by rlsys.tracking.tracker and
                                                                            rlsys.report.page

Names that begin with a dot belong to writers at work or to dead ones; the next driver repairs these (own_files.py).
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Unpack

from rlsys.config import JobConfig, dump_config
from rlsys.errors import CheckpointError, ConfigError
from rlsys.run_state import lock
from rlsys.run_state.changes import refuse_changes
from rlsys.run_state.jsonl import CONFIG, Note
from rlsys.run_state.ledger import Ledger
from rlsys.run_state.own_files import refuse_foreign, refuse_link, remove_run, repair
from rlsys.run_state.resume import Resume, newest_of_own_run, refuse_lost_checkpoints, write_checkpoint
from rlsys.run_state.run_info import RunInfo, day_of, read_info, write_info
from rlsys.run_state.saved_config import with_threads_of
from rlsys.utils.atomic_files import remove_folder, replace_file, replace_folder
from rlsys.utils.packed_folder import MANIFEST, pack_folder

BASE = "base"


class RunStore:
    """A run directory, locked by this process. A context manager: leaving it releases the lock.

    ``config`` is the job with the run's date; ``resume`` is the checkpoint to resume from, None for a new run.
    """

    def __init__(self, config: JobConfig, lock: int, info: RunInfo, resume: Resume | None, note: Note) -> None:
        """Use ``RunStore.open``."""
        self.run_dir = config.run_dir
        self.config = config
        self.resume = resume
        self._lock = lock
        self._info = info.copy()
        self._note = note

    @classmethod
    def open(
        cls,
        config: JobConfig,
        fresh: bool = False,
        note: Note = print,
        complete: Callable[[JobConfig], JobConfig] = lambda config: config,
    ) -> RunStore:
        """Start a run, or resume the run in the directory; `fresh` first removes what rlsys wrote there. `complete`
        chooses what the job and the run so far leave open, before the configuration is written.

        Raises:
            RunExistsError: another driver is running it; the directory holds files but no run, or a run with other
                settings; or it is a symbolic link, through which `fresh` would remove files.
            ConfigError: it cannot be created or written, or rl.steps is below the steps already made.
            CheckpointError: no checkpoint is intact, or all are missing although steps were made.
        """
        run_dir = config.run_dir
        try:
            refuse_foreign(run_dir)
            if fresh:
                refuse_link(run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            handle = lock.acquire(run_dir)
            try:
                refuse_foreign(run_dir)  # again: from here on no other driver writes
                if fresh:
                    remove_run(run_dir, note)
                return _opened(config, handle, note, complete)
            except BaseException:
                os.close(handle)
                raise
        except OSError as error:
            raise ConfigError(
                f"run.dir {config.run.dir!r}: the run directory {run_dir} cannot be created or written: "
                f"{error.strerror}"
            ) from error

    @property
    def info(self) -> RunInfo:
        """run.json: wandb_id, started (Unix, seconds), and what ``note`` has added."""
        return self._info.copy()

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is of the last step that rl.steps asks for."""
        return self.resume is not None and self.resume.step >= self.config.rl.steps

    @property
    def base(self) -> Path | None:
        """The folder of the base that this run has trained, if it exists and is intact."""
        path = self.run_dir / BASE
        return path if path.is_dir() else None  # a damaged one was removed when the store was opened

    def note(self, **facts: Unpack[RunInfo]) -> None:
        """Add to run.json; on disk before this returns."""
        self._info |= facts
        write_info(self.run_dir, self._info)

    def save(self, step: int, files: Mapping[str, bytes], ledger: Ledger | bytes) -> Path:
        """Write the checkpoint of a step (``resume.write_checkpoint``); the newest ``checkpoint.keep`` are kept."""
        return write_checkpoint(self.run_dir, step, files, ledger, self.config.checkpoint.keep)

    def latest(self) -> Resume | None:
        """Read the newest intact checkpoint; damaged newer ones are set aside, with a note to the user."""
        return newest_of_own_run(self.run_dir, self._note)

    def put(self, name: str, files: Mapping[str, bytes]) -> Path:
        """Make the folder run_dir/name hold exactly these files, atomically; an equal folder is not rewritten.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = self.run_dir / name
        try:
            if not path.is_dir() or _content(path) != dict(files):
                replace_folder(path, files)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        return path

    def close(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _opened(config: JobConfig, handle: int, note: Note, complete: Callable[[JobConfig], JobConfig]) -> RunStore:
    """The store of a locked directory that holds a run or nothing."""
    run_dir = config.run_dir
    config = config.dated(day_of(run_dir) or date.today().isoformat())
    if not (run_dir / CONFIG).is_file():
        config = complete(config)
        info: RunInfo = {"wandb_id": secrets.token_hex(5), "started": time.time(), "folder": str(Path.cwd())}
        write_info(run_dir, info)
        replace_file(run_dir / CONFIG, dump_config(config).encode())  # last: it makes the directory a run
        return RunStore(config, handle, info, None, note)
    refuse_changes(config, run_dir)
    info = read_info(run_dir)
    repair(run_dir, note)
    resume = newest_of_own_run(run_dir, note)
    if resume is None:
        refuse_lost_checkpoints(run_dir)
    elif resume.step > config.rl.steps:
        raise ConfigError(
            f"rl.steps {config.rl.steps}: {run_dir} is at step {resume.step}, and its last "
            f"{resume.step - config.rl.steps} steps cannot be undone. Set rl.steps={resume.step} or more, give this "
            "run another name (run.name=...), or start over with --fresh"
        )
    config = complete(with_threads_of(run_dir, config))
    _remove_damaged_base(run_dir / BASE, note)
    _keep_config(run_dir, dump_config(config).encode(), note)
    if info.get("folder") != str(Path.cwd()):
        info["folder"] = str(Path.cwd())
        write_info(run_dir, info)
    return RunStore(config, handle, info, resume, note)


def _keep_config(run_dir: Path, new: bytes, note: Note) -> None:
    path = run_dir / CONFIG
    old = path.read_bytes()
    if old == new:
        return
    taken = [int(match[1]) for file in run_dir.iterdir() if (match := re.fullmatch(r"config\.(\d+)\.yaml", file.name))]
    kept = run_dir / f"config.{max(taken, default=0) + 1:03d}.yaml"
    replace_file(kept, old)
    replace_file(path, new)
    note(f"{path}: updated; the previous configuration is in {kept.name}")


def _remove_damaged_base(path: Path, note: Note) -> None:
    if not path.is_dir():
        return
    manifest = path / MANIFEST
    if manifest.is_file() and manifest.read_bytes() == pack_folder(path)[MANIFEST]:
        return
    note(f"{path}: does not match its manifest, so it is damaged; it is removed and trained again")
    remove_folder(path)


def _content(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
