"""Full rollouts of a run's last steps: with the learner's state before a step, all inputs that `rlsys replay` needs.

    run_dir/steps/step-000007.npz   plain NumPy arrays without pickles, followed by a hash of the archive

Files are replaced atomically. One process at a time writes; any process may read.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from rlsys.errors import CheckpointError
from rlsys.rollouts import Rollouts
from rlsys.types import Array
from rlsys.utils.atomic_files import replace_file

STEPS = "steps"
FORMAT_VERSION = 1
_DIGEST_BYTES = 16
_STEP = re.compile(r"step-(\d{6,})\.npz")
_HALF = re.compile(r"\.step-\d{6,}\.npz\.new")  # of a running or dead writer (``replace_file``)
_COLUMNS = [field.name for field in fields(Rollouts)]


@dataclass(frozen=True, slots=True)
class SavedStep:
    """Inputs of a step's datums."""

    step: int
    version: int  # the learner's at the start of the step; a token's lag is this minus the token's version
    pieces: int  # parts of the step's groups: substeps times minibatches
    rollouts: Rollouts  # in draw order
    rewards: Array  # (R,) from which advantages were computed
    reference: Array | None  # (T,) float32 log-probabilities under the reference; None: no KL term

    def __post_init__(self) -> None:
        assert self.step >= 1 and self.pieces >= 1
        assert len(self.rewards) == len(self.rollouts.group)
        assert self.reference is None or len(self.reference) == len(self.rollouts.tokens)


def save_step(run_dir: Path, recorded: SavedStep, keep: int) -> Path | None:
    """Write a step, replacing an earlier file of that step, then remove all but the newest `keep`; 0: write nothing.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder = run_dir / STEPS
    path = folder / f"step-{recorded.step:06d}.npz"
    try:
        if keep > 0:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, _to_bytes(recorded))
        _remove(run_dir, [step for step in recorded_steps(run_dir)[: -keep or None] if step != recorded.step])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path if keep > 0 else None


def delete_after(run_dir: Path, step: int) -> None:
    """Remove the steps after `step`, which are repeated."""
    _remove(run_dir, [found for found in recorded_steps(run_dir) if found > step])


def recorded_steps(run_dir: Path) -> list[int]:
    """Steps that have a file, ascending."""
    folder = run_dir / STEPS
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(found[1]) for found in names if found)


def load_step(run_dir: Path, step: int) -> SavedStep:
    """Read what ``save_step`` wrote.

    Raises:
        CheckpointError: the file is missing (the message lists the steps that exist), damaged, or of another format.
    """
    path = run_dir / STEPS / f"step-{step:06d}.npz"
    try:
        return _from_bytes(path.read_bytes(), step)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist; found {format_steps(recorded_steps(run_dir))}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def format_steps(steps: list[int]) -> str:
    """``steps 1 to 3 and 7``, for people."""
    spans: list[tuple[int, int]] = []
    for step in sorted(steps):
        joins = spans and spans[-1][1] == step - 1
        spans[-1:] = [(spans[-1][0], step)] if joins else [*spans[-1:], (step, step)]
    parts = [f"{first}" if first == last else f"{first} to {last}" for first, last in spans]
    if not parts:
        return "none"
    return ("step " if len(steps) == 1 else "steps ") + " and ".join([", ".join(parts[:-1]), parts[-1]][-len(parts) :])


def _remove(run_dir: Path, steps: list[int]) -> None:
    folder = run_dir / STEPS
    for step in steps:
        (folder / f"step-{step:06d}.npz").unlink(missing_ok=True)
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _HALF.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _to_bytes(recorded: SavedStep) -> bytes:
    head = [FORMAT_VERSION, recorded.step, recorded.version, recorded.pieces]
    arrays = {name: getattr(recorded.rollouts, name) for name in _COLUMNS}
    arrays |= {"head": np.array(head, np.int64), "rewards": np.asarray(recorded.rewards)}
    if recorded.reference is not None:
        arrays["reference"] = recorded.reference
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue() + _digest(buffer.getvalue())


def _from_bytes(content: bytes, step: int) -> SavedStep:
    body = content[:-_DIGEST_BYTES]
    if content[-_DIGEST_BYTES:] != _digest(body):
        raise CheckpointError(f"its {len(content)} bytes do not match their hash: the file was changed or is damaged")
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
        format_version, of_step, version, pieces = (int(value) for value in found["head"])
        if (format_version, of_step) != (FORMAT_VERSION, step):
            raise CheckpointError(
                f"found format version {format_version} of step {of_step}; wanted {FORMAT_VERSION} of step {step}"
            )
        rollouts = Rollouts(**{name: found[name] for name in _COLUMNS})
        return SavedStep(step, version, pieces, rollouts, found["rewards"], found.get("reference"))
    except (KeyError, ValueError, AssertionError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"it lacks parts of the format: {type(error).__name__}: {error}") from error


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
