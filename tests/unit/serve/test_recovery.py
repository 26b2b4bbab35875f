"""A new controller on the database of an earlier one: kill -9 of the controller, and a restart of the service."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from rlsys.client.requests import Drop
from rlsys.errors import StorageError
from rlsys.serve import parking
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.database import NAME, Database
from rlsys.serve.paths import parse_path
from rlsys.serve.state import State
from tests.unit.serve.http_client import Http, pass_body
from tests.unit.serve.learner_backend import LearnerBackend
from tests.unit.serve.test_sessions import sample_body, sampler_of


@asynccontextmanager
async def restarted(http: Http, store: CheckpointStore) -> AsyncIterator[Http]:
    """The client of a new controller. The earlier one leaves its database alone, like a process that was killed."""
    for task in http.state._tasks:
        task.cancel()
    http.state.database.close()
    async with Http(http.backend, CheckpointStore(store.root), http.state.limits) as found:
        await found.controller.start()
        yield found
        await found.controller.stop()


async def steps(http: Http, model: str, numbers: range) -> list[float]:
    """Losses of passes, each followed by a step; two calls per number."""
    losses = []
    for i in numbers:
        passed = await http.forward_backward(model, 2 * i + 1)
        stepped = await http.optim_step(model, 2 * i + 2)
        losses.append((await http.result(passed))["metrics"]["loss:sum"])
        await http.result(stepped)
    return losses


def test_calls_that_ran_when_the_controller_was_killed_are_finished_under_their_ids_and_applied_once(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            undisturbed = await steps(http, await http.model(await http.session()), range(4))
            session = await http.session()
            model = await http.model(session)
            assert await steps(http, model, range(1)) == undisturbed[:1]
            backend.open.clear()
            passed, stepped = await http.forward_backward(model, 3), await http.optim_step(model, 4)
            await asyncio.sleep(0.05)
            async with restarted(http, store) as other:
                backend.open.set()
                assert (await other.forward_backward(model, 3)) == passed  # repeated by the client
                assert (await other.result(passed))["metrics"]["loss:sum"] == undisturbed[1]
                assert "grad_norm" in (await other.result(stepped))["metrics"]
                assert await steps(other, model, range(2, 4)) == undisturbed[2:]
                assert [op for each, op in backend.done if each == model] == ["forward_backward", "optim_step"] * 4

    asyncio.run(main())


def test_calls_that_waited_when_the_controller_was_killed_fail_and_the_next_number_runs(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            await http.result(await http.forward_backward(model, 1))
            waiting = await http.forward_backward(model, 3)  # for number 2
            async with restarted(http, store) as other:
                failed = await other.result(waiting)
                assert failed["category"] == "server" and "before it had an effect" in failed["error"]
                metrics = (await other.result(await other.optim_step(model, 4)))["metrics"]
                assert metrics["failed_forward_backward"] == 1.0

    asyncio.run(main())


def test_a_call_that_never_reached_the_learner_while_a_later_one_did_fails_and_is_told_by_the_step(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            await http.result(await http.forward_backward(model, 1))
            backend.open.clear()
            lost, later = await http.forward_backward(model, 2), await http.forward_backward(model, 3)
            await asyncio.sleep(0.05)
            calls = backend.calls[model]
            calls[1].cancel()
            calls[1] = asyncio.get_running_loop().create_future()
            calls[1].set_result(None)  # of the request that takes its number
            async with restarted(http, store) as other:
                backend.open.set()
                failed = await other.result(lost)
                assert failed["category"] == "server" and "before it had an effect" in failed["error"]
                assert (await other.result(later))["metrics"]["loss:sum"] > 0
                metrics = (await other.result(await other.optim_step(model, 4)))["metrics"]
                assert metrics["failed_forward_backward"] == 1.0

    asyncio.run(main())


def test_samplers_and_sessions_outlive_the_controller_and_old_samples_are_410(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session = await http.session()
            model = await http.model(session)
            body = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0}
            unnamed = (await http.result(await http.post("save_weights_for_sampler", body)))["sampling_session_id"]
            of_base = await sampler_of(http, session, 1)
            first = await http.result(promise := await http.post("asample", sample_body(unnamed)))
            async with restarted(http, store) as other:
                await other.post("session_heartbeat", {"session_id": session})
                again = await other.result(await other.post("asample", sample_body(unnamed, 1)))
                assert again["sequences"][0]["tokens"] == first["sequences"][0]["tokens"]
                assert "sequences" in await other.result(await other.post("asample", sample_body(of_base)))
                text = await other.refused("retrieve_future", {"request_id": promise["request_id"]}, status=410)
                assert "a server that has ended" in text
                found = (await other.send("GET", f"sessions/{session}")).json()
                assert found["training_run_ids"] == [model] and found["sampler_ids"] == [unnamed, of_base]

    asyncio.run(main())


def test_models_named_samplers_and_listings_come_back_after_a_restart_of_the_service(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            undisturbed = await steps(http, await http.model(await http.session()), range(3))
            session = await http.session()
            model = await http.model(session)
            assert await steps(http, model, range(1)) == undisturbed[:1]
            saved = await http.post("save_weights_for_sampler", {"model_id": model, "seq_id": 3, "path": "a"})
            path = (await http.result(saved))["path"]
            body = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
            named = (await http.post("create_sampling_session", body))["sampling_session_id"]
            first = await http.result(await http.post("asample", sample_body(named)))
            unstepped = await http.result(await http.forward_backward(model, 4))
            await http.controller.stop()
            assert model in backend.dropped
            async with restarted(http, store) as other:
                listed = (await other.send("GET", "checkpoints")).json()["checkpoints"]
                assert [each["tinker_path"] for each in listed] == [path]
                again = await other.result(await other.post("asample", sample_body(named, 1)))
                assert again["sequences"][0]["tokens"] == first["sequences"][0]["tokens"]
                repeated = await other.result(await other.forward_backward(model, 5))
                assert repeated.get("metrics") == unstepped["metrics"], repeated
                step = await other.result(await other.optim_step(model, 6))
                assert step["metrics"]["failed_forward_backward"] == 1.0, "the gradient of call 4 is gone, and is told"
                assert repeated["metrics"]["loss:sum"] == undisturbed[1]
                passed = await other.result(await other.forward_backward(model, 7))
                assert passed["metrics"]["loss:sum"] == undisturbed[2]

    asyncio.run(main())


def test_why_a_model_is_gone_is_told_after_any_number_of_restarts(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            left, kept = await http.session(), await http.session()
            unloaded, lost = await http.model(left), await http.model(kept)
            await http.post(f"sessions/{left}/finish", {"reason": {"type": "errored"}})
            await backend._run(backend.host.do, lost, Drop())  # as if the learner had died
            backend.calls.pop(lost, None)
            async with restarted(http, store) as second, restarted(second, store) as third:
                for model, why in (
                    (unloaded, "its client finished it (errored)"),
                    (lost, "its learner ended before 2"),
                ):
                    text = await third.refused("forward_backward", pass_body(model, 1), status=404)
                    assert why in text and "it has no checkpoint" in text

    asyncio.run(main())


def test_an_idle_model_is_parked_on_disk_and_its_next_call_finds_it_unchanged(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(resident_models=1)) as http:
            undisturbed = await steps(http, await http.model(await http.session()), range(4))
            model = await http.model(await http.session())
            busy = await http.model(await http.session())
            losses = await steps(http, model, range(2))
            await http.result(await http.forward_backward(busy, 1))  # a gradient that is on the learner alone
            parking.park_idle(http.state)
            passed = await http.forward_backward(model, 5)  # while it is on its way to disk
            losses.append((await http.result(passed))["metrics"]["loss:sum"])
            await http.result(await http.optim_step(model, 6))
            assert http.state.counts["parked"] == 2 and busy in backend.host.learner.runs.ids  # with the first model
            parking.park_idle(http.state)
            await http.state.drain(20)
            assert backend.dropped[-1] == model and http.state.models[model].parked is not None
            passed, stepped = await http.forward_backward(model, 7), await http.optim_step(model, 8)
            losses.append((await http.result(passed))["metrics"]["loss:sum"])
            await http.result(stepped)
            assert losses == undisturbed
            parking.park_idle(http.state)
            await http.state.drain(20)
            folder = http.state.models[model].parked
            assert folder is not None and folder.is_dir()
            await http.post("unload_model", {"model_id": model})
            assert not folder.exists()
            assert http.state.database.read("SELECT id FROM models WHERE id = ?", (model,)) == []

    asyncio.run(main())


def test_a_clock_that_jumps_parks_no_model_and_a_disk_that_refuses_one_is_left_alone_for_a_while(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(idle_model_s=100)) as http:
            model = http.state.models[await http.model(await http.session())]

            def parks() -> bool:
                parking.park_idle(http.state)
                return model.moving

            model.last_request -= timedelta(days=1)
            assert not parks()
            (store.root / parking.FOLDER).write_bytes(b"no folder")
            model.used -= 200
            assert parks()
            await http.state.drain(20)
            assert model.parked is None and not parks()
            await http.result(await http.forward_backward(model.id, 1))

    asyncio.run(main())


def test_a_tenant_with_too_many_queued_calls_gets_429_and_the_call_that_others_wait_for_gets_in(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(queued_calls=2)) as http:
            model = await http.model(await http.session())
            for seq in (2, 3):
                await http.forward_backward(model, seq)
            text = await http.refused("forward_backward", pass_body(model, 4), status=429)
            assert "limits.queued_calls = 2" in text
            await http.forward_backward(model, 1)
            await http.result(await http.forward_backward(model, 4))

    asyncio.run(main())


def damaged(file: Any) -> None:
    file.write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)


def of_another_version(file: Any) -> None:
    database = Database(file)
    database.write("PRAGMA user_version = 99")
    database.close()


@pytest.mark.parametrize(("spoil", "text"), [(damaged, NAME), (of_another_version, "version 99")])
def test_a_database_that_cannot_be_used_is_named(spoil: Any, text: str, store: CheckpointStore) -> None:
    store.database.close()
    file = store.root / NAME
    for each in store.root.glob(f"{NAME}*"):
        each.unlink()
    spoil(file)
    with pytest.raises(StorageError, match=text):
        CheckpointStore(store.root)


def test_the_database_is_readable_by_its_owner_alone_and_gets_folders_that_it_does_not_know(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            await http.result(await http.post("save_weights", {"model_id": model, "seq_id": 1, "path": "kept"}))
            await http.result(await http.post("save_weights", {"model_id": model, "seq_id": 2, "path": "gone"}))
            http.state.database.write("DELETE FROM checkpoints WHERE name = 'kept'")
            path = f"tinker://{model}/weights/gone"
            shutil.rmtree(store.folder("local", parse_path(path)))
            store.reconcile()
            assert [each.path.name for each in store.checkpoints("local")] == ["kept"]
            assert http.state.database.read("SELECT name FROM checkpoints WHERE name = 'gone'") == []

    asyncio.run(main())
    assert (store.root / NAME).stat().st_mode & 0o077 == 0


def test_a_killed_controller_leaves_no_model_that_nobody_knows(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            kept, ended = await http.session(), await http.session()
            models = [await http.model(session) for session in (kept, ended)]
            http.state.database.write("UPDATE sessions SET ended = 'x' WHERE id = ?", (ended,))
            async with restarted(http, store) as other:
                assert backend.dropped == [models[1]] and list(other.state.models) == [models[0]]
                state: State = other.state
                assert [str(row["id"]) for row in state.database.read("SELECT id FROM models")] == [models[0]]

    asyncio.run(main())
