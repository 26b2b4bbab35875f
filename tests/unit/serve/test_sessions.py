"""Sessions end with what they hold, limits are named, and errors say nothing about the server."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from rlsys.errors import ConfigError
from rlsys.serve import sessions
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.upkeep import stop_work
from rlsys.serve.wire.results import FailedResult, Result
from tests.unit.serve.http_client import Http, pass_body
from tests.unit.serve.learner_backend import LearnerBackend


async def sampler_of(http: Http, session: str, number: int = 0) -> str:
    body = {"session_id": session, "sampling_session_seq_id": number, "base_model": "tiny"}
    found: str = (await http.post("create_sampling_session", body))["sampling_session_id"]
    return found


def sample_body(sampler: str, seq: int = 0, **more: Any) -> dict[str, Any]:
    params = {"max_tokens": 2, "temperature": 0.0, **more.pop("sampling_params", {})}
    prompt = {"chunks": [{"tokens": [1, 2]}]}
    return {"sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "sampling_params": params, **more}


def test_a_silent_session_ends_and_frees_its_models_and_samplers(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(session_s=600.0)) as http:
            silent, alive, polling = [await http.session() for _ in range(3)]
            models = [await http.model(session) for session in (silent, alive)]
            sampled = await http.post("asample", sample_body(await sampler_of(http, polling)))
            body = {"model_id": models[0], "seq_id": 1, "sampling_session_seq_id": 0}
            await http.result(await http.post("save_weights_for_sampler", body))
            waiting = await http.optim_step(models[0], 3)
            for session in (silent, polling):
                http.state.sessions[session].seen = time.monotonic() - 601
            await http.result(sampled)
            sessions.sweep(http.state)
            assert http.state.sessions[polling].ended is None
            assert backend.dropped == [models[0]] and len(backend.released) == 1
            failed = await http.result(waiting)
            assert failed["category"] == "user" and "no request for 600 s (limits.session_s)" in failed["error"]
            assert (await http.send("POST", "session_heartbeat", {"session_id": silent})).status_code == 410
            assert await http.post("session_heartbeat", {"session_id": alive}) == {"type": "session_heartbeat"}
            assert "not loaded" in await http.refused("optim_step", {"model_id": models[0], "seq_id": 4}, status=404)

    asyncio.run(main())


def test_a_stop_string_with_half_of_a_character_is_refused_before_it_reaches_an_engine(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            body = sample_body(await sampler_of(http, await http.session()), sampling_params={"stop": ["ok", "\ud83d"]})
            answer = await http.send("POST", "asample", content=json.dumps(body).encode())
            assert answer.status_code == 400 and "half of a character" in answer.json()["detail"]

    asyncio.run(main())


def test_a_finished_session_is_over(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session = await http.session()
            sampler = await sampler_of(http, session)
            await http.post(f"sessions/{session}/finish", {"reason": {"type": "errored"}, "detail": "x"})
            assert (await http.send("POST", "session_heartbeat", {"session_id": session})).status_code == 410
            assert "its client finished it" in await http.refused("asample", sample_body(sampler))
            assert (await http.send("GET", f"sessions/{session}")).json()["sampler_ids"] == [sampler]

    asyncio.run(main())


def test_sessions_are_searched_by_name_status_and_metadata_page_by_page(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            made = []
            for name, number in (("Red Fox", "1"), ("red panda", "2"), ("blue fox", "2")):
                body = {"display_name": name, "user_metadata": {"n": number}}
                made.append((await http.post("create_session", body))["session_id"])
            await http.post(f"sessions/{made[0]}/finish", {"reason": {"type": "errored"}})

            async def found(**body: Any) -> list[int]:
                answer = await http.post("sessions/search", body)
                return [made.index(each["session_id"]) for each in answer["sessions"]]

            assert await found() == [2, 1, 0]
            assert await found(display_name="RED") == [1, 0]
            assert await found(display_name="fox red") == [0]
            assert await found(display_name="panda", session_id=made[2]) == [2, 1]
            assert await found(user_metadata={"n": "2"}) == [2, 1]
            assert await found(statuses=[{"type": "active"}]) == [2, 1]
            assert await found(statuses=[{"type": "client_finished", "reasons": ["errored"]}]) == [0]
            assert await found(statuses=[{"type": "client_finished", "reasons": ["success"]}]) == []
            page = await http.post("sessions/search", {"limit": 2})
            assert len(page["sessions"]) == 2 and page["sessions"][0]["status"] == {"type": "active"}
            rest = await http.post("sessions/search", {"limit": 2, "cursor": page["next_cursor"]})
            assert [made.index(each["session_id"]) for each in rest["sessions"]] == [0] and "next_cursor" not in rest

    asyncio.run(main())


def test_a_stopping_server_finishes_what_runs_and_refuses_what_is_new(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            backend.open.clear()
            promise = await http.forward_backward(model, 1)
            poll = asyncio.create_task(http.result(promise))
            stopping = asyncio.create_task(stop_work(http.state))
            await asyncio.sleep(0.1)
            response = await http.send("POST", "optim_step", {"model_id": model, "seq_id": 2})
            assert response.status_code == 503 and response.headers["retry-after"] == "5"
            backend.open.set()
            assert (await poll)["metrics"]["loss:sum"] > 0
            await stopping
            assert backend.dropped == [model]

    asyncio.run(main())


def test_ids_of_another_life_get_410_and_a_reason(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session = await http.session()
            promise = await http.forward_backward(await http.model(session), 1)
        async with Http(backend, store) as http:
            assert "has ended" in await http.refused("session_heartbeat", {"session_id": session}, status=410)
            text = await http.refused("retrieve_future", {"request_id": promise["request_id"]}, status=410)
            assert "belongs to a server that has ended" in text

    asyncio.run(main())


ASAMPLE = {
    "samples": ({"num_samples": 10**9}, r"num_samples: found 1000000000; wanted 1 to limits.num_samples = 1024"),
    "no samples": ({"num_samples": 0}, "num_samples"),
    "negative": ({"num_samples": -1}, "num_samples"),
    "top-k of the prompt": ({"topk_prompt_logprobs": 21}, "limits.topk_prompt_logprobs = 20"),
    "stop strings": ({"sampling_params": {"stop": ["a"] * 65}}, "limits.stop_strings = 64"),
    "long stop string": ({"sampling_params": {"stop": "a" * 257}}, "limits.stop_string_chars = 256"),
    "empty stop string": ({"sampling_params": {"stop": ""}}, "a string of 0 characters"),
    "stop id": ({"sampling_params": {"stop": [64]}}, "stop: found token id 64; wanted 0 to 63"),
    "temperature": ({"sampling_params": {"temperature": -0.1}}, "temperature"),
    "top_p": ({"sampling_params": {"top_p": 0.0}}, "top_p"),
    "top_k": ({"sampling_params": {"top_k": 0}}, "top_k"),
    "no prompt": ({"prompt": {"chunks": []}}, "prompt: found no token"),
    "prompt ids": ({"prompt": {"chunks": [{"tokens": [64]}]}}, "found ids from 64 to 64; wanted 0 to 63"),
    "huge ids": ({"prompt": {"chunks": [{"tokens": [2**70]}]}}, "prompt"),
    "full context": ({"prompt": {"chunks": [{"tokens": [1] * 64}]}}, "found 64 tokens; wanted at most 63"),
    "image": ({"prompt": {"chunks": [{"type": "image", "data": "x"}]}}, "a chunk of type 'image'"),
    "top-k of samples": ({"topk_sample_logprobs": 3}, "topk_sample_logprobs"),
    "alternatives": ({"prompt_alt_tokens_k": 3}, "prompt_alt_tokens_k"),
    "targets": ({"target_prompt_logprobs": {"data": [1]}}, "target_prompt_logprobs"),
    "number": ({"seq_id": 2**63}, "seq_id"),
    "negative number": ({"seq_id": -1}, "seq_id"),
}


@pytest.mark.parametrize(("more", "message"), ASAMPLE.values(), ids=ASAMPLE)
def test_a_sample_request_beyond_a_limit_is_refused_by_name(
    more: dict[str, Any], message: str, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            sampler = await sampler_of(http, await http.session())
            assert message in await http.refused("asample", sample_body(sampler, **more))
            assert http.state.samples_in_flight.total() == 0

    asyncio.run(main())


def test_max_tokens_defaults_to_the_end_of_the_context_and_is_cut_to_it(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            sampler = await sampler_of(http, await http.session())
            for seq, asked in enumerate((None, 10_000, 62, 61)):
                body = sample_body(sampler, seq, sampling_params={"max_tokens": asked})
                (sequence,) = (await http.result(await http.post("asample", body)))["sequences"]
                assert (len(sequence["tokens"]), sequence["stop_reason"]) == (61 if asked == 61 else 62, "length")
                assert len(sequence["logprobs"]) == len(sequence["tokens"])

    asyncio.run(main())


def test_prompt_logprobs_can_be_asked_for_the_last_tokens(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            sampler = await sampler_of(http, await http.session())
            prompt = {"chunks": [{"tokens": [5, 6]}, {"tokens": [7, 8]}]}
            found = []
            for seq, last in enumerate((None, 2, 0, 9)):
                body = sample_body(sampler, seq, prompt=prompt, prompt_logprobs=True, prompt_logprobs_last_n=last)
                found.append((await http.result(await http.post("asample", body)))["prompt_logprobs"])
            assert found[0][0] is None and all(value < 0 for value in found[0][1:])
            assert found[1] == [None, None, *found[0][2:]] and found[2] == [None] * 4 and found[3] == found[0]

    asyncio.run(main())


def test_beyond_the_samples_in_flight_a_client_is_told_to_wait(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(samples_in_flight=4)) as http:
            sampler = await sampler_of(http, await http.session())
            backend.open.clear()
            promises = [await http.post("asample", sample_body(sampler, seq, num_samples=2)) for seq in range(2)]
            response = await http.send("POST", "asample", sample_body(sampler, 2))
            assert response.status_code == 429 and response.headers["retry-after"] == "1"
            assert "limits.samples_in_flight = 4" in response.json()["detail"]
            backend.open.set()
            for promise in promises:
                await http.result(promise)
            assert "request_id" in await http.post("asample", sample_body(sampler, 2)), (
                "the same number is served later"
            )

    asyncio.run(main())


def test_a_cancelled_request_fails_and_frees_its_place(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            sampler = await sampler_of(http, await http.session())
            backend.open.clear()
            promise = await http.post("asample", sample_body(sampler))
            await asyncio.sleep(0.05)
            await http.post("cancel_future", {"request_id": promise["request_id"]})
            assert (await http.result(promise))["error"] == "the request was cancelled"
            await asyncio.sleep(0)
            assert http.state.samples_in_flight.total() == 0

    asyncio.run(main())


def test_the_oldest_idle_unnamed_sampler_goes_first(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(samplers=2)) as http:
            session = await http.session()
            model = await http.model(session)
            samplers = []
            for number in range(3):
                body = {"model_id": model, "seq_id": number + 1, "sampling_session_seq_id": number}
                promise = await http.post("save_weights_for_sampler", body)
                samplers.append((await http.result(promise))["sampling_session_id"])
            text = await http.refused("asample", sample_body(samplers[0]))
            assert "it was the oldest idle of limits.samplers = 2 samplers" in text
            for sampler in samplers[1:]:
                assert "sequences" in await http.result(await http.post("asample", sample_body(sampler)))

    asyncio.run(main())


def test_models_and_sessions_are_limited_by_tenant(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(models=1, sessions=2)) as http:
            session = await http.session()
            await http.model(session)
            create = {"session_id": session, "model_seq_id": 1, "base_model": "tiny", "lora_config": {"rank": 2}}
            assert "limits.models = 1: end a session" in await http.refused("create_model", create)
            await http.session()
            assert "limits.sessions = 2" in await http.refused("create_session", {})

    asyncio.run(main())


CREATE = {
    "unknown base": ({"base_model": "other"}, "wanted one of Qwen/Qwen3-8B-Base, tiny"),
    "a folder": ({"base_model": "/etc"}, "base_model: found '/etc'"),
    "rank": ({"lora_config": {"rank": 17}}, "lora_config.rank: found 17; this server serves at most 16"),
    "rank 0": ({"lora_config": {"rank": 0}}, "lora_config.rank"),
    "optimizer": ({"optimizer_config": {"type": "dimuon"}}, "found 'dimuon'; wanted 'adamw'"),
    "no targets": (
        {"lora_config": {"rank": 4, "train_mlp": False, "train_attn": False, "train_unembed": False}},
        "found no target to train",
    ),
}


@pytest.mark.parametrize(("more", "message"), CREATE.values(), ids=CREATE)
def test_a_model_that_can_never_be_served_is_refused_at_once(
    more: dict[str, Any], message: str, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            body = {"session_id": await http.session(), "model_seq_id": 0, "base_model": "tiny", **more}
            assert message in await http.refused("create_model", body)

    asyncio.run(main())


def test_get_info_has_the_name_that_the_client_gave(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            alias = "Qwen/Qwen3-8B-Base"
            session = await http.session()
            create = {"session_id": session, "model_seq_id": 0, "base_model": alias, "lora_config": {"rank": 2}}
            model = (await http.result(await http.post("create_model", create)))["model_id"]
            info = await http.post("get_info", {"model_id": model})
            assert info["model_name"] == info["model_data"]["model_name"] == alias
            assert (info["lora_rank"], info["is_lora"], info["model_data"]["arch"]) == (2, True, "Qwen3ForCausalLM")
            names = [
                each["model_name"]
                for each in (await http.send("GET", "get_server_capabilities")).json()["supported_models"]
            ]
            assert names == ["tiny", alias]

    asyncio.run(main())


def test_no_answer_names_a_folder_of_the_server(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session = await http.session()
            model = await http.model(session)
            saved = await http.result(await http.post("save_weights", {"model_id": model, "seq_id": 1, "path": "w"}))
            folder = next(store.root.rglob("weights/w"))
            (folder / "adapter_model.safetensors").write_bytes(b"damaged")
            load = {"model_id": model, "seq_id": 2, "path": saved["path"]}
            failed = await http.result(await http.post("load_weights", load))
            sampler = {"session_id": session, "sampling_session_seq_id": 0, "model_path": saved["path"]}
            refused = await http.refused("create_sampling_session", sampler)
            (folder / "rlsys-checkpoint.json").write_bytes(b"{")
            info = await http.refused("weights_info", {"tinker_path": saved["path"]}, status=404)
            for text in (failed["error"], refused, info):
                assert str(store.root) not in text and "/tmp" not in text and "damaged" in text, text
            assert failed["category"] == "user" and saved["path"] in failed["error"]

    asyncio.run(main())


def test_an_unexpected_error_gives_a_reference_and_not_its_text(
    backend: LearnerBackend, store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> str:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            backend.host.learner.runs.drop(model)  # a state that no client can bring about
            failed = await http.result(await http.post("forward_backward", pass_body(model, 1)))
            backend.dropped.append(model)
            text: str = failed["error"]
            return text

    text = asyncio.run(main())
    assert "does not exist" in text or "reference" in text
    assert "Traceback" not in text and str(Path(__file__).parents[3]) not in text and ".py" not in text


def test_an_error_calls_a_base_by_the_name_that_clients_know(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> Result | None:
        async def fail() -> Result:
            raise ConfigError(f"{backend.bases['tiny'].about.folder}: has no weights")

        async with Http(backend, store) as http:
            promise = http.state.promises.new("local", "session")
            await http.state.settle(promise, fail())
            return promise.result

    failed = asyncio.run(main())
    assert isinstance(failed, FailedResult) and failed.failure.error == "tiny: has no weights"


def test_the_start_of_a_client(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            assert (await http.send("GET", "healthz", key=None)).json() == {"status": "ok"}
            flags = await http.post("client/config", {"sdk_version": "0.22.0"})
            assert flags["proto_write_fwdbwd"] and not flags["use_pyqwest_transport"]
            assert (await http.post("client/config", {}, key="sk-abc"))["pjwt_auth_enabled"]
            assert (await http.post("client/dynamic_config", {}))["sample_cancel_enabled"]
            assert await http.post("telemetry", {"events": [{"a": 1}]}) == {"status": "accepted"}
            for path in ("retrieve_futures", "join_sampling_session", "copy_weights", "mint/checkpoints/interpolate"):
                assert (await http.send("POST", path, {})).status_code == 404

    asyncio.run(main())


def test_train_unembed_is_off_where_samplers_cannot_serve_it_and_the_client_is_told(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    from dataclasses import replace

    async def main() -> None:
        base = backend._bases["tiny"]
        backend._bases["tiny"] = replace(base, about=replace(base.about, serves_unembed=False))
        try:
            async with Http(backend, store) as http:
                created = await http.post("create_session", {})
                assert "train_unembed is off for tiny" in created["warning_message"]
                model = await http.model(created["session_id"])
                run = http.state.store.run("local", model)
                assert run is not None and not run.train_unembed and run.train_mlp
        finally:
            backend._bases["tiny"] = base

    asyncio.run(main())


def test_at_a_limit_a_session_that_is_no_longer_heard_of_makes_room(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(models=1, sessions=2)) as http:
            gone, here = await http.session(), await http.session()
            model = await http.model(gone)
            create = {"session_id": here, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
            await http.refused("create_model", create)
            http.state.sessions[gone].seen = time.monotonic() - 121
            await http.model(here)
            assert model not in http.state.models and http.state.sessions[here].ended is None
            http.state.sessions[here].seen = time.monotonic() - 121
            assert {await http.session(), await http.session()} <= http.state.sessions.keys()
            assert http.state.sessions[here].ended is not None

    asyncio.run(main())


@pytest.mark.parametrize(("version", "closed"), [("0.6.0", True), ("0.15.0", True), ("0.22.0", False), ("0", False)])
def test_a_number_that_a_client_in_order_left_out_closes_within_seconds(
    version: str, closed: bool, backend: LearnerBackend, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "IN_ORDER_GAP_S", 0.05)

    async def main() -> None:
        async with Http(backend, store) as http:
            session = (await http.post("create_session", {"sdk_version": version}))["session_id"]
            model = await http.model(session)
            behind = await http.optim_step(model, 2)
            await asyncio.sleep(0.1)
            sessions.sweep(http.state)
            assert http.state.models[model].queue.waiting == (not closed)
            if closed:
                assert "call 1 of this model never arrived" in (await http.result(behind))["error"]

    asyncio.run(main())
