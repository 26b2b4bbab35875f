"""Work of a learner beside the requests of its training clients. It takes turns with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlsys.client.backend import ModelHandle, SnapshotHandle
from rlsys.client.requests import Request
from rlsys.config import LoraSection
from rlsys.weight_sync.canary import StartupProbe

Files = Mapping[str, bytes]  # of a checkpoint's folder, for ranks that cannot read it


@dataclass(frozen=True, slots=True)
class CreateRun(Request[ModelHandle]):
    op = "create_model"
    lora: LoraSection
    seed: int


@dataclass(frozen=True, slots=True)
class RestoreRun(Request[ModelHandle]):
    op = "restore_model"
    path: str
    optimizer: bool
    files: Files | None = None


@dataclass(frozen=True, slots=True)
class LoadFiles(Request[str]):
    """As LoadState."""

    op = "load_state"
    path: str
    optimizer: bool
    files: Files


@dataclass(frozen=True, slots=True)
class OpenSnapshot(Request[SnapshotHandle]):
    """Of a saved adapter."""

    op = "open"
    path: str
    files: Files | None = None


@dataclass(frozen=True, slots=True)
class PublishSaved(Request[SnapshotHandle]):
    """As TakeSnapshot, of a run that was saved at `path`."""

    op = "snapshot"
    path: str | None


@dataclass(frozen=True, slots=True)
class MakeProbe(Request[StartupProbe]):
    op = "probe"
