"""Finds and reads the policy to evaluate, and checks that it matches the job before anything starts."""

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
from rlsys.learner.checkpoint_files import CONFIG as ADAPTER_CONFIG
from rlsys.learner.checkpoint_files import MANIFEST, WEIGHTS, read_files, read_info
from rlsys.run_state.jsonl import CONFIG, read_problems
from rlsys.run_state.resume import CHECKPOINTS, newest
from rlsys.run_state.run_dir import BASE
from rlsys.run_state.run_info import day_of
from rlsys.run_state.saved_config import with_threads_of
from rlsys.utils.packed_folder import pack_folder
from rlsys.utils.shell_paths import as_written

Kind = Literal["base", "adapter", "merged"]
ADAPTER = {ADAPTER_CONFIG, WEIGHTS, MANIFEST}  # files of a checkpoint
MODEL_CONFIG = "config.json"  # of a model in Hugging Face format
WANTED = (
    "wanted a run directory, a checkpoint in it (run/checkpoints/step-000007 or run/adapter), or a merged model in "
    "Hugging Face format"
)


@dataclass(frozen=True, slots=True)
class PolicySource:
    """Policy in the form in which actors load it."""

    kind: Kind
    name: str  # name of the evaluation's files
    path: str  # source of the policy
    version: int | None  # optimizer steps of an adapter; None for a model without an adapter
    base: str | Path  # str: folder or Hub name that every node can read; Path: local folder that is sent to the actors
    files: Mapping[str, bytes]  # the adapter's checkpoint without optimizer state; empty without an adapter
    trained: Sequence[str]  # training prompts of the run that made the policy; empty if unknown
    config: JobConfig  # the job's configuration, with `model` replaced by the model to load


def find_policy(config: JobConfig, checkpoint: Path | None) -> PolicySource:
    """Find the policy in `checkpoint`: a run's newest or an older adapter, or a merged model; None: the base model.

    Raises:
        CheckpointError: `checkpoint` has no policy or is damaged, or the adapter does not match the job's `lora`.
            Whether the adapter matches the base model is checked when the base model is loaded.
    """
    config = resolve_paths(config)
    if checkpoint is None:
        config = _as_run(config, config.run_dir)
        base = _base(config, None)
        return PolicySource("base", "base", str(base), None, base, {}, (), config)
    path = checkpoint.absolute()
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{checkpoint}: {problem}; {WANTED}")
    if (path / CONFIG).is_file():
        return _newest_of(config, path)
    if (path / MANIFEST).is_file():
        return _adapter(config, path, path, _run_of(path))
    if (path / MODEL_CONFIG).is_file():
        model = ModelSection(path=as_written(path), dtype=config.model.dtype, max_length=config.model.max_length)
        config = _as_run(config.model_copy(update={"model": model}), config.run_dir)
        return PolicySource("merged", _by_name("merged", path.name), str(path), None, str(path), {}, (), config)
    if (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{checkpoint}: is an adapter without {MANIFEST}, so its base model is unknown; {WANTED}")
    raise CheckpointError(f"{checkpoint}: contains no checkpoint; {WANTED}")


def _newest_of(config: JobConfig, run: Path) -> PolicySource:
    """Read the newest checkpoint of a run once: a running job may remove its folder meanwhile."""
    latest = newest(run)
    if latest is None:
        raise CheckpointError(f"{run}: this run has no checkpoint yet; {WANTED}")
    with tempfile.TemporaryDirectory(prefix="rlsys-candidate-") as scratch:
        for name in ADAPTER & latest.files.keys():
            (Path(scratch) / name).write_bytes(latest.files[name])
        return _adapter(config, latest.path, Path(scratch), run)


def _adapter(config: JobConfig, path: Path, folder: Path, run: Path | None) -> PolicySource:
    """Return the adapter checkpoint `path`, whose files are in `folder`."""
    info = read_info(folder)
    _refuse_other_lora(path, info.lora, config.lora)
    with tempfile.TemporaryDirectory(prefix="rlsys-candidate-") as scratch:
        for name, content in {**read_files(folder), MANIFEST: (folder / MANIFEST).read_bytes()}.items():
            (Path(scratch) / name).write_bytes(content)
        files = pack_folder(Path(scratch))
    name = path.name if path.parent.name == CHECKPOINTS else _by_name("adapter", path.name)
    trained = tuple(problem.prompt for problem in read_problems(run).values()) if run else ()
    config = _as_run(config, run or config.run_dir)
    return PolicySource("adapter", name, str(path), info.version, _base(config, run), files, trained, config)


def _refuse_other_lora(path: Path, adapter: LoraSection, job: LoraSection) -> None:
    of_adapter, of_job = adapter.model_dump(), job.model_dump()
    differences = [
        f"lora.{key}={of_adapter[key]}, the job {of_job[key]}" for key in of_job if of_adapter[key] != of_job[key]
    ]
    if differences:
        raise CheckpointError(
            f"{path}: the adapter does not match the job's LoRA settings: it has {'; '.join(differences)}"
        )


def _as_run(config: JobConfig, run: Path) -> JobConfig:
    """Set the date in prompts to that of the policy's run, or to today without a run; and unset thread counts to those
    of the run. Without a run they stay unset: 1, so that evaluations are equal however busy the machine is."""
    return with_threads_of(run, config.dated(day_of(run) or date.today().isoformat()))


def _run_of(path: Path) -> Path | None:
    """Return the directory of the run that a checkpoint belongs to; None if it is outside of a run directory."""
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
    return run if (run / CONFIG).is_file() else None


def _base(config: JobConfig, run: Path | None) -> str | Path:
    """Return the job's model.path, or the base model that a run trained from scratch."""
    if config.model.path is not None:
        return config.model.path
    folders = [folder / BASE for folder in (run, config.run_dir) if folder is not None]
    base = next((folder for folder in folders if folder.is_dir()), None)
    if base is None:
        raise CheckpointError(
            f"{folders[-1]}: the job trains its base model from scratch (model.make), but no run has done so yet; "
            "start a run with `rlsys train`, or set --checkpoint to the directory of a run that has a base model"
        )
    return base


def _by_name(kind: Kind, name: str) -> str:
    return name if name.startswith(kind) else f"{kind}-{name}"
