"""Which policy an evaluation is of: found, read and compared with the job before anything starts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from rlsys.config import JobConfig, LoraSection, ModelSection
from rlsys.config.relative_paths import resolve_paths
from rlsys.errors import CheckpointError
from rlsys.learner.adapter_checkpoint import CONFIG as ADAPTER_CONFIG
from rlsys.learner.adapter_checkpoint import MANIFEST, WEIGHTS, read_files, read_info
from rlsys.modeling.base_model import pack_folder
from rlsys.run_state.jsonl import CONFIG, read_problems
from rlsys.run_state.resume import CHECKPOINTS, newest
from rlsys.run_state.run_dir import BASE
from rlsys.run_state.run_info import day_of
from rlsys.utils.shell_paths import as_written

Kind = Literal["base", "adapter", "merged"]
ADAPTER = {ADAPTER_CONFIG, WEIGHTS, MANIFEST}  # files of a checkpoint
MODEL_CONFIG = "config.json"  # of a model in Hugging Face format
WANTED = (
    "wanted a run's directory, a checkpoint of it (run/checkpoints/step-000007 or run/adapter), or a whole model in "
    "Hugging Face format"
)


@dataclass(frozen=True, slots=True)
class PolicySource:
    """A policy as actors load it.

    ``base``: a folder or hub name that every node can read, or, as a Path, a folder of this machine that is sent to
    them. ``files``: a packed checkpoint of the adapter without its optimizer; empty where there is no adapter.
    ``trained``: the prompts that its run trains on, as far as that is known.
    """

    kind: Kind
    name: str  # of what is written about it
    path: str  # where it was found
    version: int | None  # optimizer steps; None where it is no adapter
    base: str | Path
    files: Mapping[str, bytes]
    trained: Sequence[str]
    config: JobConfig  # the job's, with the model that is loaded


def find_policy(config: JobConfig, checkpoint: Path | None) -> PolicySource:
    """What `checkpoint` holds: a run's newest or an older adapter, or a merged model; None: the base.

    Raises:
        CheckpointError: there is nothing of the kind, it is damaged, or the adapter is not of this job's `lora`.
            Whether it is of this base is known once that is loaded.
    """
    config = resolve_paths(config)
    if checkpoint is None:
        config = _dated(config, config.run_dir)
        base = _base(config, None)
        return PolicySource("base", "base", str(base), None, base, {}, (), config)
    path = checkpoint.absolute()
    if not path.is_dir():
        raise CheckpointError(f"{checkpoint}: found {'no folder' if path.exists() else 'nothing'} there; {WANTED}")
    if (path / CONFIG).is_file():
        return _newest_of(config, path)
    if (path / MANIFEST).is_file():
        return _adapter(config, path, path, _run_of(path))
    if (path / MODEL_CONFIG).is_file():
        model = ModelSection(path=as_written(path), dtype=config.model.dtype, max_length=config.model.max_length)
        config = _dated(config.model_copy(update={"model": model}), config.run_dir)
        return PolicySource("merged", _by_name("merged", path.name), str(path), None, str(path), {}, (), config)
    if (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint}: is an adapter without {MANIFEST}, so nothing tells of which base it is; {WANTED}"
        )
    raise CheckpointError(f"{checkpoint}: holds no checkpoint; {WANTED}")


def _newest_of(config: JobConfig, run: Path) -> PolicySource:
    """From one reading: a run that goes on may remove the folder meanwhile."""
    latest = newest(run)
    if latest is None:
        raise CheckpointError(f"{run}: this run has no checkpoint yet; {WANTED}")
    with tempfile.TemporaryDirectory(prefix="rlsys-candidate-") as scratch:
        for name in ADAPTER & latest.files.keys():
            (Path(scratch) / name).write_bytes(latest.files[name])
        return _adapter(config, latest.path, Path(scratch), run)


def _adapter(config: JobConfig, path: Path, folder: Path, run: Path | None) -> PolicySource:
    """The adapter of `path`, whose files are in `folder`."""
    info = read_info(folder)
    _refuse_other_lora(path, info.lora, config.lora)
    with tempfile.TemporaryDirectory(prefix="rlsys-candidate-") as scratch:
        for name, content in {**read_files(folder), MANIFEST: (folder / MANIFEST).read_bytes()}.items():
            (Path(scratch) / name).write_bytes(content)
        files = pack_folder(Path(scratch))
    name = path.name if path.parent.name == CHECKPOINTS else _by_name("adapter", path.name)
    trained = tuple(problem.prompt for problem in read_problems(run).values()) if run else ()
    config = _dated(config, run or config.run_dir)
    return PolicySource("adapter", name, str(path), info.version, _base(config, run), files, trained, config)


def _refuse_other_lora(path: Path, found: LoraSection, wanted: LoraSection) -> None:
    old, new = found.model_dump(), wanted.model_dump()
    other = [f"lora.{key}={old[key]}, the job {new[key]}" for key in new if old[key] != new[key]]
    if other:
        raise CheckpointError(f"{path}: is an adapter of another shape than the job's: it has {'; '.join(other)}")


def _dated(config: JobConfig, run: Path) -> JobConfig:
    """A policy is asked with the date that it was trained with, today's where there is no run."""
    return config.dated(day_of(run) or date.today().isoformat())


def _run_of(path: Path) -> Path | None:
    """The run whose directory a checkpoint lies in."""
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
    return run if (run / CONFIG).is_file() else None


def _base(config: JobConfig, run: Path | None) -> str | Path:
    """What the job's model.path says, or what a run made."""
    if config.model.path is not None:
        return config.model.path
    places = [place / BASE for place in (run, config.run_dir) if place is not None]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{places[-1]}: the job makes its base from nothing (model.make), and no run has made it yet; start one "
            "with `rlsys train`, or give the directory of one that has as --checkpoint"
        )
    return found


def _by_name(kind: Kind, name: str) -> str:
    return name if name.startswith(kind) else f"{kind}-{name}"
