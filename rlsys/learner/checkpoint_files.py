"""The files of a checkpoint, read as bytes once their hashes are right. Needs no torch: drivers send and copy them.

The format: rlsys/learner/adapter_checkpoint.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from pydantic import ValidationError

from rlsys.config import LoraSection
from rlsys.errors import CheckpointError
from rlsys.learner.base_fingerprint import BaseFingerprint
from rlsys.utils.manifest import digest, file_entry

FORMAT, FORMAT_VERSION = "rlsys-checkpoint", 1
CONFIG, WEIGHTS, OPTIMIZER = "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"
MANIFEST = "rlsys-checkpoint.json"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Manifest(TypedDict):
    """The JSON of MANIFEST, as this format version has it; `info_of` checks it."""

    format: str
    format_version: int
    run_id: str
    version: int
    lora: dict[str, object]
    base_name: str
    base: dict[str, str]
    files: dict[str, object]  # name -> file_entry
    digest: NotRequired[str]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint says of itself; `base_name` is what the saving learner called its base."""

    run_id: str
    version: int  # optimizer steps
    lora: LoraSection
    has_optimizer: bool
    base_name: str
    base: BaseFingerprint


def checkpoint_path(root: Path, name: str) -> Path:
    """Where the checkpoint of that name lies. Names are plain, so that none leads out of `root`."""
    if not _PLAIN.fullmatch(name):
        raise CheckpointError(
            f"checkpoint name {name!r}: wanted 1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    return root / name


def read_info(path: Path) -> CheckpointInfo:
    """What the checkpoint says of itself; of its files only this one is read."""
    return info_of(Path(path), read_manifest(Path(path)))


def read_files(path: Path, names: tuple[str, ...] = (CONFIG, WEIGHTS)) -> dict[str, bytes]:
    """Contents that the checkpoint vouches for."""
    manifest = read_manifest(Path(path))
    info_of(Path(path), manifest)
    return {name: read_content(Path(path), name, manifest["files"]) for name in names}


def read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise CheckpointError(f"{path}: found no folder; wanted a checkpoint of rlsys")
    content = _bytes(path, MANIFEST)
    try:
        manifest: object = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {MANIFEST} is no JSON, so it is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: {MANIFEST} is not of a checkpoint of rlsys")
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise CheckpointError(f"{path}: found format version {found!r}; this rlsys reads {FORMAT_VERSION}")
    if manifest.pop("digest", None) != digest(manifest):
        raise CheckpointError(f"{path}: {MANIFEST} does not match its own hash: it was changed or is damaged")
    return cast(Manifest, manifest)


def info_of(path: Path, manifest: Manifest) -> CheckpointInfo:
    try:
        names = set(dict(manifest["files"]))
        info = CheckpointInfo(
            str(manifest["run_id"]),
            int(manifest["version"]),
            LoraSection.model_validate(manifest["lora"]),
            OPTIMIZER in names,
            str(manifest["base_name"]),
            BaseFingerprint(**manifest["base"]),
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} lacks what the format has: {error}") from error
    if names not in ({CONFIG, WEIGHTS}, {CONFIG, WEIGHTS, OPTIMIZER}):
        raise CheckpointError(f"{path}: {MANIFEST} names the files {sorted(names)}; wanted those of the format alone")
    return info


def read_content(path: Path, name: str, files: Mapping[str, object]) -> bytes:
    content = _bytes(path, name)
    found, wanted = file_entry(content), files.get(name)
    if found != wanted:
        raise CheckpointError(f"{path}: {name} is truncated or damaged: found {found}; wanted {wanted}")
    return content


def _bytes(path: Path, name: str) -> bytes:
    file = path / name
    if file.is_symlink() or not file.is_file():
        reason = "is a link, which may lead out of it" if file.is_symlink() else "is missing"
        raise CheckpointError(f"{path}: is no checkpoint of rlsys: {name} {reason}")
    return file.read_bytes()
