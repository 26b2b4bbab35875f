"""The database on a disk that is full or that another process holds: what goes on, what is refused, what comes back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.serve import serve
from rlsys.errors import StorageError
from rlsys.serve import database as databases
from rlsys.serve import recovery, sessions
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits, ServeConfig
from rlsys.serve.database import NAME, Database
from rlsys.serve.state import State
from tests.unit.serve.http_client import Http, pass_body
from tests.unit.serve.learner_backend import LearnerBackend
from tests.unit.serve.test_disk import fill, own_disk, save_body
from tests.unit.serve.test_sessions import sample_body, sampler_of

SESSION = {"tags": [], "sdk_version": "0.38.0"}


def model_body(session: str, number: int) -> dict[str, Any]:
    return {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": 4}}


def fill_all(store: CheckpointStore) -> Path:
    """Fill the disk, and the room inside the database: no write succeeds any more."""
    rest = store.root / ".rest"
    fill(rest)
    for size in (2000, 1):
        with pytest.raises(StorageError, match="the disk is full"):
            write_on(store.database, "x" * size)
    return rest


def write_on(database: Database, content: str) -> None:
    for number in range(100_000):
        database.write("INSERT INTO settings VALUES (?, ?)", (f"{len(content)} {number}", content))


def test_on_a_full_disk_saves_fail_by_name_and_all_other_calls_go_on(backend: LearnerBackend, tmp_path: Path) -> None:
    async def main(store: CheckpointStore) -> None:
        async with Http(backend, store) as http:
            await http.controller.start()
            session = await http.session()
            model = await http.model(session)
            fill(rest := store.root / ".rest")
            for number in range(12):
                assert "metrics" in await http.result(await http.forward_backward(model, 3 * number + 1))
                assert "metrics" in await http.result(await http.optim_step(model, 3 * number + 2))
                failed = await http.result(await http.post("save_weights", save_body(model, 3 * number + 3, "w")))
                assert "No space left on device" in failed["error"] and failed["category"] == "server", failed
            other = await http.session()
            assert await http.model(other, 0) and await http.session()
            sampler = await sampler_of(http, session, 0)
            assert "sequences" in await http.result(await http.post("asample", sample_body(sampler)))
            await http.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
            assert model in backend.dropped and http.state.database.pending == 0
            rest.unlink()
            await http.controller.stop()

    with own_disk(tmp_path / "checkpoints", "32m"):
        asyncio.run(main(CheckpointStore(tmp_path / "checkpoints")))


def test_when_the_database_has_no_room_either_requests_are_refused_at_once_and_the_service_recovers(
    backend: LearnerBackend, tmp_path: Path
) -> None:
    async def main(store: CheckpointStore) -> None:
        async with Http(backend, store) as http:
            session, leaving = await http.session(), await http.session()
            model, left = await http.model(session), await http.model(leaving)
            sampler = await sampler_of(http, session, 0)
            await http.result(await http.forward_backward(model, 1))
            rest = fill_all(store)
            for path, body in (
                ("create_session", SESSION),
                ("create_model", model_body(session, 1)),
                (
                    "create_sampling_session",
                    {"session_id": session, "sampling_session_seq_id": 1, "base_model": "tiny"},
                ),
            ):
                answer = await http.send("POST", path, body)
                assert (answer.status_code, answer.headers["x-should-retry"]) == (507, "false"), path
                text = answer.json()["detail"]
                assert "the disk is full" in text and "reference" in text and str(store.root) not in text
            failed = await http.result(first := await http.forward_backward(model, 2))
            assert failed["category"] == "server" and "the disk is full" in failed["error"], failed
            assert await http.forward_backward(model, 2) == first, "its number is used up"
            assert "sequences" in await http.result(await http.post("asample", sample_body(sampler)))
            await http.post(f"sessions/{leaving}/finish", {"reason": {"type": "success"}})
            assert backend.dropped == [left], "what its client left is released"
            sessions.sweep(http.state)
            assert http.state.promises.unsettled == 0
            await recovers(backend, store, session, model)
            rest.unlink()
            metrics = (await http.result(await http.optim_step(model, 3)))["metrics"]
            assert metrics["failed_forward_backward"] == 1.0 and await http.model(session, 1)
            assert http.state.database.pending == 0
            (row,) = store.database.read("SELECT next, failed_passes FROM models WHERE id = ?", (model,))
            assert (row["next"], row["failed_passes"]) == (4, 0)
            (row,) = store.database.read("SELECT ended FROM sessions WHERE id = ?", (leaving,))
            assert row["ended"] and store.database.read("SELECT id FROM models WHERE id = ?", (left,)) == []

    with own_disk(tmp_path / "checkpoints", "2m"):
        asyncio.run(main(CheckpointStore(tmp_path / "checkpoints")))


async def recovers(backend: LearnerBackend, store: CheckpointStore, session: str, model: str) -> None:
    """A controller that takes the place of a killed one finds its session and its model."""
    found = State(backend, Limits(), CheckpointStore(store.root))
    await recovery.recover(found)
    assert session in found.sessions and list(found.models) == [model]
    found.database.close()


def test_a_model_whose_record_cannot_be_written_is_released_on_the_learner(
    backend: LearnerBackend, tmp_path: Path
) -> None:
    async def main(store: CheckpointStore) -> None:
        async with Http(backend, store) as http:
            session = await http.session()
            backend.open.clear()
            promise = await http.post("create_model", model_body(session, 0))
            rest = fill_all(store)
            backend.open.set()
            failed = await http.result(promise)
            assert failed["category"] == "server" and "the disk is full" in failed["error"], failed
            await http.state.drain(20)
            assert backend.dropped == [promise["model_id"]] and http.state.models == {}
            assert await http.post("create_model", model_body(session, 0)) == promise
            rest.unlink()
            http.state.database.flush()  # as once a second
            assert await http.model(session, 1)
            assert [row["id"] for row in store.database.read("SELECT id FROM models")] == list(http.state.models)

    with own_disk(tmp_path / "checkpoints", "2m"):
        asyncio.run(main(CheckpointStore(tmp_path / "checkpoints")))


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Another process holds the right to write."""
    program = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE'); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield
        process.communicate()


def test_requests_are_repeated_while_another_process_holds_the_database(
    backend: LearnerBackend, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session = await http.session()
            model = await http.model(session)
            with locked(store.root / NAME):
                for path, body in (("create_session", SESSION), ("forward_backward", pass_body(model, 1))):
                    answer = await http.send("POST", path, body)
                    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.text
                    assert "another process has locked it" in answer.json()["detail"]
                began = asyncio.get_running_loop().time()
                for _ in range(20):
                    assert (await http.send("POST", "create_session", SESSION)).status_code == 503
                assert asyncio.get_running_loop().time() - began < databases.BUSY_S, "they do not wait one by one"
            assert "metrics" in await http.result(await http.forward_backward(model, 1))
            assert await http.session()

    monkeypatch.setattr(databases, "BUSY_S", 0.5)
    store.database.close()
    store.database = Database(store.root / NAME)
    asyncio.run(main())


def damaged_inside(file: Path) -> None:
    database = Database(file)
    with database.together():
        for number in range(500):
            database.write("INSERT INTO runs VALUES (?, 'a', '2026', ?)", (str(number), "x" * 500))
    database.close()
    content = bytearray(file.read_bytes())
    content[40_000:90_000] = bytes(50_000)
    file.write_bytes(content)


def no_database(file: Path) -> None:
    file.write_bytes(b"what a shell script redirected here\n" * 100)


@pytest.mark.parametrize(("spoil", "found"), [(damaged_inside, "is damaged"), (no_database, "is damaged")])
def test_a_damaged_database_ends_the_command_before_a_start_with_what_to_do(
    spoil: Callable[[Path], None], found: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    spoil(folder / NAME)
    config = {"models": {"tiny": str(tmp_path)}, "bind": {"port": 0}, "keys": None, "checkpoints": str(folder)}
    with pytest.raises(StorageError, match=rf"{folder / NAME}: {found} \(.*\); .*move it and its -wal and -shm files"):
        serve(ServeConfig.model_validate(config))


def test_a_database_that_is_locked_or_read_only_at_the_start_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "BUSY_S", 0.1)
    with own_disk(tmp_path, "2m"):
        CheckpointStore(tmp_path).database.close()
        with locked(tmp_path / NAME), pytest.raises(StorageError, match=f"{tmp_path / NAME}: another process .*fuser"):
            CheckpointStore(tmp_path)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(StorageError, match=f"{tmp_path / NAME}: cannot be written: Read-only file system"):
            CheckpointStore(tmp_path)
