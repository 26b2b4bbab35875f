"""A run as a folder of safetensors and JSON: what it has learned up to its last step.

    adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's layout
    optimizer.safetensors                            <parameter>.step, .exp_avg, .exp_avg_sq; only where asked for
    rlsys-checkpoint.json                            format, base, run, and size and hash of every file; its own too

A folder appears whole or not at all. Gradients that have accumulated since the last step are not in it. Reading takes
the files that the format names and no others, each from memory once its hash is right, and nothing is run from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save_file
from torch import Tensor

from rlsys.config import LoraSection
from rlsys.errors import CheckpointError, StorageError
from rlsys.learner.base_fingerprint import BaseFingerprint
from rlsys.learner.checkpoint_files import (
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    OPTIMIZER,
    WEIGHTS,
    CheckpointInfo,
    info_of,
    read_content,
    read_info,
    read_manifest,
)
from rlsys.learner.runs import RunState
from rlsys.utils.atomic_files import new_folder
from rlsys.utils.manifest import file_entry, sealed

if TYPE_CHECKING:
    from rlsys.learner.learner import Learner

_PREFIX, _SUFFIX = "base_model.model.", ".weight"  # around a parameter's name in PEFT's layout


def save_run(learner: Learner, run_id: str, path: Path, with_optimizer: bool, overwrite: bool = False) -> None:
    """Write the run to the new folder `path`; with `overwrite` it takes the place of what is there.

    Raises:
        CheckpointError: there is something at `path`.
        StorageError: it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: is already there; wanted another name, or overwrite")
    if path.exists() and not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: is no checkpoint of rlsys, and only such a one is overwritten")
    state = learner.runs.state(run_id)
    try:
        with new_folder(path, overwrite) as folder:
            learner.runs.save_adapter(run_id, folder)
            if with_optimizer:
                assert state.optimizer is not None
                save_file({key: value.cpu().contiguous() for key, value in state.optimizer.items()}, folder / OPTIMIZER)
            names = (CONFIG, WEIGHTS, *([OPTIMIZER] if with_optimizer else []))
            body = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "run_id": run_id,
                "version": state.version,
                "lora": learner.runs.lora(run_id).model_dump(),
                "base_name": learner.base_name,
                "base": asdict(learner.identity),
                "files": {name: file_entry(_readable(folder / name)) for name in names},
            }
            (folder / MANIFEST).write_bytes(sealed(body))
            (folder / MANIFEST).chmod(0o644)
    except FileExistsError as error:
        raise CheckpointError(f"{path}: is already there; wanted another name, or overwrite") from error
    except (OSError, SafetensorError) as error:  # safetensors reports a disk's refusal by an error of its own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(f"{path}: cannot be written: {reason}") from error


def load_run(learner: Learner, run_id: str, path: Path, with_optimizer: bool) -> None:
    """Put an existing run of the same section into the checkpoint's state; without the optimizer, moments start anew.

    Raises:
        CheckpointError: the checkpoint is damaged, foreign, of another base or another section. The run is as before.
    """
    info, state = _read(Path(path), with_optimizer)
    where = f"{path}: cannot be loaded into run {run_id!r}"
    if info.lora != learner.runs.lora(run_id):
        raise CheckpointError(
            f"{where}: found {_format_lora(info.lora)}; wanted the run's {_format_lora(learner.runs.lora(run_id))}"
        )
    require_base(where, info.base, learner.identity)
    try:
        learner.runs.restore(run_id, state)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def restore_run(learner: Learner, run_id: str, path: Path, with_optimizer: bool) -> CheckpointInfo:
    """A new run as the checkpoint has it; none on failure. Errors as `load_run`."""
    info = read_info(path)
    learner.runs.create(run_id, info.lora, seed=0)  # its weights are replaced at once
    try:
        load_run(learner, run_id, path, with_optimizer)
    except BaseException:
        learner.runs.drop(run_id)
        raise
    return info


def read_adapter(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Also the weights, ``<module path>.lora_A`` (r, in) and ``.lora_B`` (out, r), without the scale alpha / r."""
    info, state = _read(Path(path), with_optimizer=False)
    return info, dict(state.weights)


def require_base(where: str, found: BaseFingerprint, wanted: BaseFingerprint) -> None:
    """Refuse an adapter of another base: on other weights it would load, and say nonsense."""
    if found.shape != wanted.shape:
        raise CheckpointError(
            f"{where}: it is of a base of another shape: found {found.summary}; wanted {wanted.summary}"
        )
    if found.weights != wanted.weights:
        raise CheckpointError(
            f"{where}: it is of a base of the same shape ({found.summary}) with other weights: found {found.weights}; "
            f"wanted {wanted.weights}"
        )


def _readable(file: Path) -> bytes:
    """The file's content, once other users may read it: safetensors writes 0600."""
    file.chmod(0o644)
    return file.read_bytes()


def _read(path: Path, with_optimizer: bool) -> tuple[CheckpointInfo, RunState]:
    manifest = read_manifest(path)
    info = info_of(path, manifest)
    if with_optimizer and not info.has_optimizer:
        raise CheckpointError(f"{path}: was saved without optimizer state; load the weights alone")
    weights = {}
    for name, tensor in _tensors(path, WEIGHTS, manifest["files"]).items():
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            raise CheckpointError(f"{path}: {WEIGHTS}: found tensor {name!r}; wanted names {_PREFIX}...{_SUFFIX}")
        weights[name.removeprefix(_PREFIX).removesuffix(_SUFFIX)] = tensor
    return info, RunState(
        info.version, weights, _tensors(path, OPTIMIZER, manifest["files"]) if with_optimizer else None
    )


def _tensors(path: Path, name: str, files: Mapping[str, object]) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = parse_tensors(read_content(path, name, files))
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that torch has not
        raise CheckpointError(f"{path}: {name} is no safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name}: {key} holds values that are not finite")
    return tensors


def _format_lora(lora: LoraSection) -> str:
    return ", ".join(f"{key} {value}" for key, value in lora.model_dump().items())
