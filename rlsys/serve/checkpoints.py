"""Checkpoints and runs on disk, by tenant. They are listed and loaded after any restart.

    <root>/serve.sqlite3                  rows of runs and checkpoints: owner, time, expiry, metadata
    <root>/<tenant>/<run>/<kind>/<name>/  a checkpoint; see rlsys.learner.adapter_checkpoint

A checkpoint exists while both its row and its folder do: the row is written first. Learner and server see the same
folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rlsys.errors import CheckpointError, StorageError
from rlsys.serve.database import NAME, Database, Value
from rlsys.serve.errors import Refusal, bad_request
from rlsys.serve.paths import KINDS, CheckpointPath, Kind, folder_name, run_of_folder
from rlsys.serve.paths import NAME as NAME_OF
from rlsys.utils.atomic_files import remove_folder

METADATA_DEPTH = 64
WHY = 500  # characters that are kept of why a run ended


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
    ended: str | None = None  # why its model is gone


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved checkpoint and its owner."""

    tenant: str
    path: CheckpointPath
    folder: Path
    record: Record


class CheckpointStore:
    """Folders of checkpoints, and their rows in the database. Paths are checked before they come here: see
    `rlsys.serve.paths`."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            StorageError: the folder or its database cannot be used.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"checkpoints: {root}: cannot be created: {error.strerror}") from error
        self._root = Path(os.path.realpath(root))
        self.database = Database(self._root / NAME)

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
        rows = self.database.read(
            "SELECT tenant, record FROM checkpoints "
            "WHERE run_id = ? AND kind = ? AND name = ? AND (tenant = ? OR public)",
            (path.run_id, path.kind, path.name, tenant),
        )
        for row in sorted(rows, key=lambda row: row["tenant"] != tenant):
            found = self._checkpoint(str(row["tenant"]), path, row["record"])
            if found is not None:
                return found
        raise CheckpointError(f"{path.text}: no such checkpoint")

    def own(self, tenant: str, path: CheckpointPath) -> Checkpoint:
        """
        Raises:
            Refusal: 404: the tenant has no such checkpoint.
        """
        found = self.get(tenant, path)
        if found is None:
            raise Refusal(404, f"{path.text}: no such checkpoint")
        return found

    def put_record(self, tenant: str, path: CheckpointPath, record: Record) -> None:
        """
        Raises:
            StorageError: the disk refuses.
        """
        self.database.catch_up()  # with what it did to an earlier checkpoint of this name
        self._put_record(tenant, path, record)

    def put_back(self, tenant: str, path: CheckpointPath, record: Record | None) -> None:
        """The record before a save that failed. None: there was none."""
        if record is None:
            self._forget_later(tenant, path)
        else:
            self.database.eventually(f"checkpoint {tenant} {path.text}", lambda: self._put_record(tenant, path, record))

    def note_size(self, tenant: str, path: CheckpointPath, size: int) -> None:
        """Of a checkpoint that was saved."""
        statement = (
            "UPDATE checkpoints SET record = json_set(record, '$.size_bytes', ?) "
            "WHERE tenant = ? AND run_id = ? AND kind = ? AND name = ?"
        )
        values = (size, tenant, path.run_id, path.kind, path.name)
        self.database.eventually(f"size of {tenant} {path.text}", lambda: self.database.write(statement, values))

    def _put_record(self, tenant: str, path: CheckpointPath, record: Record) -> None:
        expires = None if record.expires_at is None else _text(record.expires_at)
        row: dict[str, Value] = {"tenant": tenant, "run_id": path.run_id, "kind": path.kind, "name": path.name}
        row |= {"time": _text(record.time), "expires_at": expires, "public": int(record.public)}
        self.database.put("checkpoints", {**row, "record": record.model_dump_json()})

    def forget(self, tenant: str, path: CheckpointPath) -> None:
        """Remove the row of a checkpoint that has no folder."""
        self.database.write(
            "DELETE FROM checkpoints WHERE tenant = ? AND run_id = ? AND kind = ? AND name = ?",
            (tenant, path.run_id, path.kind, path.name),
        )

    def _forget_later(self, tenant: str, path: CheckpointPath) -> None:
        self.database.eventually(f"checkpoint {tenant} {path.text}", lambda: self.forget(tenant, path))

    def delete(self, checkpoint: Checkpoint, run_has_ended: bool = False) -> None:
        """`run_has_ended`: nothing is saved in the run's folder any more, so an empty one goes too.

        Raises:
            Refusal: 404: another request was faster.
            StorageError: the disk refuses.
        """
        path = checkpoint.path
        try:
            remove_folder(checkpoint.folder)
        except FileNotFoundError:
            raise Refusal(404, f"{path.text}: no such checkpoint") from None
        except OSError as error:
            raise StorageError(f"{path.text}: cannot be deleted: {error.strerror}") from error
        self._forget_later(checkpoint.tenant, path)
        if run_has_ended:
            with suppress(OSError):  # not empty
                checkpoint.folder.parent.rmdir()
                checkpoint.folder.parents[1].rmdir()

    def checkpoints(self, tenant: str, run_id: str | None = None) -> list[Checkpoint]:
        """The tenant's checkpoints, newest first."""
        where, values = ("", ()) if run_id is None else (" AND run_id = ?", (run_id,))
        return self._listed(f"tenant = ?{where} ORDER BY time DESC", (tenant, *values))

    def readable(self, tenant: str) -> list[Checkpoint]:
        """The tenant's checkpoints and published ones of others, newest first."""
        return self._listed("tenant = ? OR public ORDER BY time DESC", (tenant,))

    def put_run(self, tenant: str, run: RunRecord) -> None:
        row = {"id": run.run_id, "tenant": tenant, "created_at": _text(run.created_at)}
        self.database.put("runs", {**row, "record": run.model_dump_json()})

    def note_end(self, run_id: str, why: str) -> None:
        """Why the model of a run is gone."""
        statement, values = "UPDATE runs SET record = json_set(record, '$.ended', ?) WHERE id = ?", (why[:WHY], run_id)
        self.database.eventually(f"end of {run_id}", lambda: self.database.write(statement, values))

    def run(self, tenant: str, run_id: str) -> RunRecord | None:
        rows = self.database.read("SELECT record FROM runs WHERE id = ? AND tenant = ?", (run_id, tenant))
        return RunRecord.model_validate_json(str(rows[0]["record"])) if rows else None

    def runs(self, tenant: str) -> list[RunRecord]:
        """The tenant's runs, newest first."""
        rows = self.database.read("SELECT record FROM runs WHERE tenant = ? ORDER BY created_at DESC", (tenant,))
        return [RunRecord.model_validate_json(str(row["record"])) for row in rows]

    def expired(self, now: datetime) -> list[Checkpoint]:
        """Checkpoints of all tenants whose time is over."""
        return self._listed("expires_at <= ?", (_text(now),))

    def reconcile(self) -> None:
        """Make rows and folders agree after a crash or a copy of folders: a folder without a row gets one with
        defaults, a row without a folder goes."""
        known = {
            (str(row["tenant"]), CheckpointPath(str(row["run_id"]), _kind(row["kind"]), str(row["name"])))
            for row in self.database.read("SELECT tenant, run_id, kind, name FROM checkpoints")
        }
        found = {(tenant, path) for tenant in self._tenants() for path in self._folders(tenant)}
        with self.database.together():
            for tenant, path in known - found:
                self.forget(tenant, path)
            for tenant, path in found - known:
                folder = self.folder(tenant, path)
                time = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
                self._put_record(tenant, path, Record(time=time, size_bytes=size_of(folder)))

    def _tenants(self) -> list[str]:
        return sorted(
            entry.name
            for entry in os.scandir(self._root)
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        )

    def _folders(self, tenant: str) -> Iterator[CheckpointPath]:
        """Paths of the checkpoints that are on disk."""
        for run in os.scandir(self._root / tenant):
            run_id = run_of_folder(run.name)
            if run_id is None or not run.is_dir(follow_symlinks=False):
                continue
            for kind in KINDS:
                folder = Path(run.path, kind)
                for entry in os.scandir(folder) if folder.is_dir() and not folder.is_symlink() else ():
                    if entry.is_dir(follow_symlinks=False) and NAME_OF.fullmatch(entry.name):
                        yield CheckpointPath(run_id, kind, entry.name)

    def _listed(self, where: str, values: tuple[str, ...]) -> list[Checkpoint]:
        rows = self.database.read(f"SELECT tenant, run_id, kind, name, record FROM checkpoints WHERE {where}", values)
        found = []
        for row in rows:
            path = CheckpointPath(str(row["run_id"]), _kind(row["kind"]), str(row["name"]))
            with suppress(CheckpointError):  # a link
                found.append(self._checkpoint(str(row["tenant"]), path, row["record"]))
        return [each for each in found if each is not None]

    def get(self, tenant: str, path: CheckpointPath) -> Checkpoint | None:
        """The tenant's own checkpoint."""
        rows = self.database.read(
            "SELECT record FROM checkpoints WHERE tenant = ? AND run_id = ? AND kind = ? AND name = ?",
            (tenant, path.run_id, path.kind, path.name),
        )
        return self._checkpoint(tenant, path, rows[0]["record"]) if rows else None

    def _checkpoint(self, tenant: str, path: CheckpointPath, record: object) -> Checkpoint | None:
        """None: its folder is not there: it is being saved, or was removed by hand."""
        folder = self.folder(tenant, path)
        if not folder.is_dir():
            return None
        return Checkpoint(tenant, path, folder, Record.model_validate_json(str(record)))


def check_store(root: Path) -> None:
    """
    Raises:
        StorageError: the folder or its database cannot be used; the message says what to do.
    """
    CheckpointStore(root).database.close()


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())


def _text(time: datetime) -> str:
    """A form whose order as text is that of time."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _kind(value: object) -> Kind:
    return KINDS[KINDS.index(value)]  # ValueError: no version writes another


def metadata_size(value: object) -> int:
    """Bytes of the user's JSON.

    Raises:
        Refusal: 400: it cannot be stored: it is nested too deeply, or has a number beyond 1e308 or half a character.
    """
    try:
        _refuse_depth(value, 0)
        return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError:
        raise bad_request("user_metadata: found a lone surrogate; wanted text that UTF-8 can hold") from None
    except ValueError:
        raise bad_request("user_metadata: found a number beyond 1e308; wanted finite numbers") from None


def _refuse_depth(value: object, depth: int) -> None:
    if depth > METADATA_DEPTH:
        raise bad_request(f"user_metadata: found more than {METADATA_DEPTH} levels of nesting")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        _refuse_depth(each, depth + 1)
