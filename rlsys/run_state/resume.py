"""Where a run is resumed: its checkpoints, and the newest intact one.

    checkpoints/step-000007/    the learner's files, ledger.npz, and resume.json: step, size and hash of each file

A checkpoint counts only when every file has the size and hash that resume.json states.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsys.errors import CheckpointError
from rlsys.run_state.jsonl import Note, last_step
from rlsys.run_state.ledger import Ledger
from rlsys.utils.atomic_files import is_plain, remove, remove_folder, replace_folder
from rlsys.utils.manifest import digest, file_entry, sealed

CHECKPOINTS, LEDGER, RESUME = "checkpoints", "ledger.npz", "resume.json"
FORMAT, FORMAT_VERSION = "rlsys-resume", 1
_STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Resume:
    """An intact checkpoint, read into memory."""

    path: Path
    step: int
    ledger: bytes
    files: Mapping[str, bytes]  # the learner's


def newest(run_dir: Path, note: Note = print) -> Resume | None:
    """Read the newest intact checkpoint of a run that another process may be writing. Changes nothing; None: no
    checkpoint exists.

    Raises:
        CheckpointError: checkpoints exist, and none is intact.
    """
    return _newest(run_dir, note, set_aside=False)


def newest_of_own_run(run_dir: Path, note: Note) -> Resume | None:
    """As ``newest``, by the driver that holds the lock: damaged newer checkpoints are renamed to damaged-..."""
    return _newest(run_dir, note, set_aside=True)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint, ascending; none of them is read."""
    return sorted(step for step, _ in _checkpoints(run_dir))


def read_checkpoint(run_dir: Path, step: int) -> Resume:
    """The checkpoint after that step. Changes nothing.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return _read(_folder(run_dir, step), step)


def write_checkpoint(run_dir: Path, step: int, files: Mapping[str, bytes], ledger: Ledger | bytes, keep: int) -> Path:
    """Write the checkpoint of a step atomically, then remove all but the newest `keep`.

    A ledger that changes while another thread saves has to come as bytes.

    Raises:
        CheckpointError: it cannot be written, or the ledger is of another step.
    """
    if isinstance(ledger, Ledger):
        if ledger.step != step:
            raise CheckpointError(f"checkpoint of step {step}: found a ledger of step {ledger.step}")
        ledger = ledger.to_bytes()
    assert not {LEDGER, RESUME} & files.keys(), f"{LEDGER} and {RESUME} are written here"
    contents = {**files, LEDGER: ledger}
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "time": time.time(),
        "files": {name: file_entry(content) for name, content in contents.items()},
    }
    contents[RESUME] = sealed(body)
    path = _folder(run_dir, step)
    try:
        replace_folder(path, contents)
        for _, old in _checkpoints(run_dir)[keep:]:
            remove_folder(old)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def refuse_lost_checkpoints(run_dir: Path) -> None:
    """Raises CheckpointError where metrics of steps exist without a checkpoint: starting over would delete them."""
    done = last_step(run_dir)
    if done > 0:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: found no checkpoint, but metrics of {done} steps; start over with --fresh, "
            "which removes the metrics too, or give this run another name (run.name=...)"
        )


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def _checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first."""
    folder = run_dir / CHECKPOINTS
    matches = ((_STEP.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _newest(run_dir: Path, note: Note, set_aside: bool) -> Resume | None:
    complaints = []
    for step, path in _checkpoints(run_dir):
        try:
            resume = _read(path, step)
        except (CheckpointError, OSError) as error:
            complaints.append(str(error))
            continue
        for complaint in complaints:
            note(f"{complaint}; resuming from step {resume.step} instead")
        if set_aside:
            for later, damaged in _checkpoints(run_dir):
                if later > step:
                    _set_aside(damaged)
        return resume
    if complaints:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: none of {len(complaints)} checkpoints is intact, so the run cannot be resumed: "
            f"{'; '.join(complaints)}. Start over with --fresh, or give this run another name (run.name=...)"
        )
    return None


def _set_aside(path: Path) -> None:
    """Keep a damaged checkpoint for inspection, under a name that nothing reads."""
    target = path.with_name(f"damaged-{path.name}")
    remove(target)
    os.rename(path, target)


def _read(path: Path, step: int) -> Resume:
    try:
        body = json.loads((path / RESUME).read_bytes())
        seal = body.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: {RESUME} is missing or damaged ({type(error).__name__}: {error})") from error
    if seal != digest(body):
        raise CheckpointError(f"{path}: {RESUME} does not match its own hash: it was changed or is damaged")
    if (body.get("format"), body.get("format_version"), body.get("step")) != (FORMAT, FORMAT_VERSION, step):
        found = {key: body.get(key) for key in ("format", "format_version", "step")}
        raise CheckpointError(f"{path}: {RESUME}: found {found}; wanted {FORMAT} {FORMAT_VERSION} of step {step}")
    contents = {}
    for name, entry in body["files"].items():
        if not is_plain(name):
            raise CheckpointError(f"{path}: {RESUME} names the file {name!r}, which is outside the folder")
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error.strerror}") from error
        if file_entry(contents[name]) != entry:
            raise CheckpointError(
                f"{path}: {name} does not match its hash (found {len(contents[name])} bytes, wanted {entry['bytes']}): "
                "it was changed or is damaged"
            )
    return Resume(path, step, contents.pop(LEDGER), contents)
