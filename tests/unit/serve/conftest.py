"""One learner for all tests of the HTTP layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsys.serve.checkpoints import CheckpointStore
from tests.unit.serve.learner_backend import LearnerBackend
from tests.unit.tiny_learner import Models


@pytest.fixture(scope="package")
def shared_backend(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> LearnerBackend:
    return LearnerBackend(tiny_model(True), tmp_path_factory.mktemp("unused"))


@pytest.fixture
def backend(shared_backend: LearnerBackend) -> Iterator[LearnerBackend]:
    for record in (shared_backend.dropped, shared_backend.released, shared_backend.done):
        record.clear()
    yield shared_backend
    shared_backend.open.set()
    shared_backend.forget()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")
