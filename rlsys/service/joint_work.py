"""What several learner ranks do of a request: rank 0 itself, and all others together with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsys.client import requests
from rlsys.client.requests import Request
from rlsys.learner.checkpoint_files import CONFIG, MANIFEST, OPTIMIZER, WEIGHTS, read_info
from rlsys.service.host_requests import Files, LoadFiles, OpenSnapshot, PublishSaved, RestoreRun
from rlsys.service.learner_host import TrainingHost


def split(host: TrainingHost, model_id: str, request: Request[Any]) -> tuple[Request[Any], Request[Any] | None]:
    """(request of rank 0, request of the others; None: they have no part in it). Reads or writes what is only on the
    node of rank 0, so that what fails there fails before the others begin."""
    match request:
        case requests.SaveState() | requests.SaveWeightsForSampler() | requests.SaveFolder() | requests.Skip():
            return request, None  # these only read the run, which is the same on every rank
        case requests.TakeSnapshot(name):
            published = PublishSaved(host.save_snapshot(model_id, name))
            return published, published
        case requests.LoadState(path, optimizer):
            return request, LoadFiles(path, optimizer, _read(host.folder(path)))
        case RestoreRun(path, optimizer):
            return request, RestoreRun(path, optimizer, _read(host.folder(path)))
        case OpenSnapshot(path):
            return request, OpenSnapshot(path, _read(host.folder(path)))
    return request, request


def _read(folder: Path) -> Files:
    """Files of a checkpoint.

    Raises:
        CheckpointError: it is none.
    """
    read_info(folder)
    files = [folder / name for name in (MANIFEST, CONFIG, WEIGHTS, OPTIMIZER)]
    return {file.name: file.read_bytes() for file in files if file.is_file()}
