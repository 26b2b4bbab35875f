"""Checkpoints and runs on disk, by tenant. They are listed and loaded after any restart.

    <root>/<tenant>/<run>/run.json                     what the run is
    <root>/<tenant>/<run>/<kind>/<name>/               a checkpoint; see rlsys.learner.adapter_checkpoint
    <root>/<tenant>/<run>/<kind>/.records/<name>.json  what the server knows of it

A checkpoint exists while its folder does; a folder without a record, from a server that died in between, is listed with
defaults. Learner and server see the same folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rlsys.errors import CheckpointError, StorageError
from rlsys.serve.errors import Refusal
from rlsys.serve.paths import KINDS, CheckpointPath, Kind, checkpoint_of, folder_name, run_of_folder
from rlsys.utils.atomic_files import remove_folder, replace_file

RECORDS = ".records"


class Record(BaseModel):
    """What the server knows of a checkpoint."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    time: datetime
    expires_at: datetime | None = None
    public: bool = False
    user_metadata: dict[str, Any] = {}  # Any: the user's JSON
    size_bytes: int | None = None


class RunRecord(BaseModel):
    """What a run is."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    run_id: str
    session_id: str
    base_model: str  # name under which the client asked
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    created_at: datetime
    last_request_time: datetime
    user_metadata: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved checkpoint and its owner."""

    tenant: str
    path: CheckpointPath
    folder: Path
    record: Record


class CheckpointStore:
    """Paths are checked before they come here: see `rlsys.serve.paths`."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = Path(os.path.realpath(root))

    @property
    def root(self) -> Path:
        return self._root

    def folder(self, tenant: str, path: CheckpointPath) -> Path:
        """Folder of a checkpoint, which need not exist.

        Raises:
            CheckpointError: a link on the way leads elsewhere.
        """
        folder = self._root / tenant / folder_name(path.run_id) / path.kind / path.name
        if Path(os.path.realpath(folder)) != folder:
            raise CheckpointError(f"{path.text}: its folder is a link, which may lead elsewhere")
        return folder

    def find(self, tenant: str, path: CheckpointPath) -> Checkpoint:
        """A checkpoint that the tenant may read: an own one, or one that is public.

        Raises:
            CheckpointError: there is none. The same for one of another tenant.
        """
        own = self._read(tenant, path)
        if own is not None:
            return own
        for other in self._tenants():
            found = self._read(other, path)
            if found is not None and found.record.public:
                return found
        raise CheckpointError(f"{path.text}: no such checkpoint")

    def own(self, tenant: str, path: CheckpointPath) -> Checkpoint:
        """
        Raises:
            Refusal: 404: the tenant has no such checkpoint.
        """
        found = self._read(tenant, path)
        if found is None:
            raise Refusal(404, f"{path.text}: no such checkpoint")
        return found

    def exists(self, tenant: str, path: CheckpointPath) -> bool:
        return self._read(tenant, path) is not None

    def put_record(self, tenant: str, path: CheckpointPath, record: Record) -> None:
        file = self._record_file(tenant, path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, record.model_dump_json(indent=1).encode())
        except OSError as error:
            raise StorageError(f"{path.text}: its record cannot be written: {error.strerror}") from error

    def delete(self, checkpoint: Checkpoint) -> None:
        remove_folder(checkpoint.folder)
        self._record_file(checkpoint.tenant, checkpoint.path).unlink(missing_ok=True)

    def checkpoints(self, tenant: str, run_id: str | None = None) -> list[Checkpoint]:
        """The tenant's checkpoints, newest first."""
        runs = [run_id] if run_id is not None else [run for run, _ in self._run_folders(tenant)]
        found = [each for run in runs for each in self._of_run(tenant, run)]
        return sorted(found, key=lambda each: each.record.time, reverse=True)

    def put_run(self, tenant: str, run: RunRecord) -> None:
        folder = self._root / tenant / folder_name(run.run_id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / "run.json", run.model_dump_json(indent=1).encode())
        except OSError as error:
            raise StorageError(f"run {run.run_id}: its record cannot be written: {error.strerror}") from error

    def run(self, tenant: str, run_id: str) -> RunRecord | None:
        return _run_record(self._root / tenant / folder_name(run_id) / "run.json")

    def runs(self, tenant: str) -> list[RunRecord]:
        """The tenant's runs, newest first."""
        found = [_run_record(folder / "run.json") for _, folder in self._run_folders(tenant)]
        return sorted((run for run in found if run is not None), key=lambda run: run.created_at, reverse=True)

    def expired(self, now: datetime) -> list[Checkpoint]:
        """Checkpoints of all tenants whose time is over."""
        return [
            each
            for tenant in self._tenants()
            for each in self.checkpoints(tenant)
            if each.record.expires_at is not None and each.record.expires_at <= now
        ]

    def _tenants(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self._root) if entry.is_dir(follow_symlinks=False))

    def _run_folders(self, tenant: str) -> Iterator[tuple[str, Path]]:
        folder = self._root / tenant
        if not folder.is_dir():
            return
        for entry in os.scandir(folder):
            run_id = run_of_folder(entry.name)
            if run_id is not None and entry.is_dir(follow_symlinks=False):
                yield run_id, Path(entry.path)

    def _of_run(self, tenant: str, run_id: str) -> Iterator[Checkpoint]:
        for kind in KINDS:
            folder = self._root / tenant / folder_name(run_id) / kind
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                found = self._named(tenant, run_id, kind, entry.name)
                if found is not None:
                    yield found

    def _named(self, tenant: str, run_id: str, kind: Kind, name: str) -> Checkpoint | None:
        try:
            return self._read(tenant, checkpoint_of(run_id, kind, name))
        except (Refusal, CheckpointError):  # .records, a folder that is being written, a link
            return None

    def _read(self, tenant: str, path: CheckpointPath) -> Checkpoint | None:
        folder = self.folder(tenant, path)
        if not folder.is_dir():
            return None
        record = _record(self._record_file(tenant, path))
        if record is None:
            record = Record(time=datetime.fromtimestamp(folder.stat().st_mtime, UTC))
        return Checkpoint(tenant, path, folder, record)

    def _record_file(self, tenant: str, path: CheckpointPath) -> Path:
        return self._root / tenant / folder_name(path.run_id) / path.kind / RECORDS / f"{path.name}.json"


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())


def _record(file: Path) -> Record | None:
    try:
        return Record.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"record of {file.stem}: is damaged: {type(error).__name__}") from error


def _run_record(file: Path) -> RunRecord | None:
    try:
        return RunRecord.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"record of {file.parent.name}: is damaged: {type(error).__name__}") from error


def metadata_size(value: object) -> int:
    return len(json.dumps(value, separators=(",", ":")))
