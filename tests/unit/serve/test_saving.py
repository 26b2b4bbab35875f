"""Saving, loading and listing over HTTP, for one tenant."""

from __future__ import annotations

import asyncio
import io
import tarfile
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.state import State
from rlsys.serve.upkeep import remove_expired
from tests.unit.serve.http_client import Http, pass_body
from tests.unit.serve.learner_backend import LearnerBackend


async def trained(http: Http, steps: int = 2) -> tuple[str, str, int]:
    """(session, model, next number)."""
    session = await http.session()
    model = await http.model(session)
    for step in range(steps):
        await http.forward_backward(model, 2 * step + 1)
        await http.result(await http.optim_step(model, 2 * step + 2))
    return session, model, 2 * steps + 1


async def losses_of(http: Http, model: str, seq: int, steps: int = 2) -> list[float]:
    found = []
    for step in range(steps):
        promise = await http.forward_backward(model, seq + 2 * step)
        await http.optim_step(model, seq + 2 * step + 1)
        found.append((await http.result(promise))["metrics"]["loss:sum"])
    return found


@pytest.mark.parametrize("way", ["one call", "create, then load", "on a live model"])
@pytest.mark.parametrize("optimizer", [True, False])
def test_a_saved_state_continues_with_the_same_bits(
    way: str, optimizer: bool, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session, model, seq = await trained(http)
            saved = await http.result(
                await http.post("save_weights", {"model_id": model, "seq_id": seq, "path": "here"})
            )
            assert saved == {"type": "save_weights", "path": f"tinker://{model}/weights/here"}
            wanted = await losses_of(http, model, seq + 1, 3)
            load_call: dict[str, Any] = {"path": saved["path"], "optimizer": optimizer}
            if way == "one call":
                create = {**load_call, "session_id": session, "model_seq_id": 1}
                loaded = await http.result(await http.post("load_weights", create))
                assert loaded == {"type": "load_weights", "model_id": f"{session}:train:1", "path": saved["path"]}
                other, first = loaded["model_id"], 1
            elif way == "create, then load":
                info = await http.post("weights_info", {"tinker_path": saved["path"]})
                assert info == {
                    "base_model": "tiny", "is_lora": True, "lora_rank": 4,
                    "train_unembed": True, "train_mlp": True, "train_attn": True,
                }  # fmt: skip
                other, first = await http.model(session, 1, rank=info["lora_rank"]), 2
                promise = await http.post("load_weights", {**load_call, "model_id": other, "seq_id": 1})
                assert await http.result(promise) == {"type": "load_weights", "path": saved["path"]}
            else:
                other, first = model, seq + 8
                promise = await http.post("load_weights", {**load_call, "model_id": model, "seq_id": seq + 7})
                assert (await http.result(promise))["path"] == saved["path"]
            found = await losses_of(http, other, first, 3)
            assert found[0] == wanted[0] and (found == wanted) == optimizer

    asyncio.run(main())


def test_a_name_that_is_taken_fails_for_the_user_also_while_the_first_save_runs(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, seq = await trained(http, 1)
            body = {"model_id": model, "path": "here"}
            promises = [await http.post("save_weights", {**body, "seq_id": seq + i}) for i in range(2)]
            promises.append(await http.post("save_weights", {**body, "seq_id": seq + 2, "overwrite": True}))
            results = [await http.result(promise) for promise in promises]
            promises = [await http.post("save_weights", {**body, "seq_id": seq + 3})]
            results.append(await http.result(promises[0]))
            taken = {
                "error": f"tinker://{model}/weights/here: is already there; wanted another name, or overwrite=True",
                "category": "user",
            }
            assert results[1] == results[3] == taken and "path" in results[0] and "path" in results[2]

    asyncio.run(main())


def test_an_unnamed_save_gives_a_sampler_of_its_weights_and_older_ones_keep_theirs(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def greedy(http: Http, sampler: str, seq: int) -> list[int]:
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq,
            "num_samples": 2,
            "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
            "sampling_params": {"max_tokens": 12, "temperature": 0.0},
            "prompt_logprobs": True,
        }
        promise = await http.post("asample", body)
        assert len(promise["sample_sequence_ids"]) == 2
        result = await http.result(promise)
        assert result["prompt_logprobs"][0] is None and len(result["prompt_logprobs"]) == 3
        assert await http.post("asample", {**body, "num_samples": 10**9}) == promise, "the number decides"
        tokens: list[int] = result["sequences"][0]["tokens"]
        return tokens

    async def main() -> None:
        async with Http(backend, store) as http:
            session, model, seq = await trained(http, 1)
            samplers, answers = [], []
            for number in range(3):
                body = {"model_id": model, "seq_id": seq, "sampling_session_seq_id": number}
                promise = await http.post("save_weights_for_sampler", body)
                again = await http.post("save_weights_for_sampler", {**body, "sampling_session_seq_id": 77})
                assert again == promise
                samplers.append((await http.result(promise))["sampling_session_id"])
                answers.append(await greedy(http, samplers[-1], 0))
                await losses_of(http, model, seq + 1, 4)
                seq += 9
            assert samplers == [f"{session}:sample:{number}" for number in range(3)]
            assert [await greedy(http, sampler, 1) for sampler in samplers] == answers
            assert answers[0] != answers[1] or answers[1] != answers[2]
            found = (await http.send("GET", f"samplers/{samplers[0]}")).json()
            assert found == {"sampler_id": samplers[0], "base_model": "tiny"}

    asyncio.run(main())


def test_a_named_sampler_checkpoint_samples_from_its_path(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session, model, seq = await trained(http)
            body = {"model_id": model, "seq_id": seq, "path": "s", "user_metadata": {"note": "x"}}
            path = (await http.result(await http.post("save_weights_for_sampler", body)))["path"]
            assert path == f"tinker://{model}/sampler_weights/s"
            create = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
            first = await http.post("create_sampling_session", create)
            assert await http.post("create_sampling_session", create) == first
            found = (await http.send("GET", f"samplers/{first['sampling_session_id']}")).json()
            assert (found["base_model"], found["model_path"]) == ("tiny", path)
            text = await http.refused(
                "create_sampling_session", {**create, "sampling_session_seq_id": 1, "model_path": path + "x"}
            )
            assert text == f"{path}x: no such checkpoint"

    asyncio.run(main())


def test_runs_and_checkpoints_are_listed_after_their_session_and_by_another_server(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session, model, seq = await trained(http, 1)
            for i, (call, name) in enumerate((("save_weights", "a"), ("save_weights_for_sampler", "b"))):
                body = {"model_id": model, "seq_id": seq + i, "path": name, "ttl_seconds": 100 if i else None}
                await http.result(await http.post(call, body))
            await http.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
            assert model in backend.dropped
            http.state = State(backend, Limits(), store)
        async with Http(backend, store) as http:
            run = (await http.send("GET", f"training_runs/{model.replace(':', '%3A')}")).json()
            assert (run["training_run_id"], run["base_model"], run["lora_rank"]) == (model, "tiny", 4)
            assert run["last_checkpoint"]["checkpoint_id"] == "weights/a"
            assert run["last_sampler_checkpoint"]["expires_at"] > run["last_sampler_checkpoint"]["time"]
            runs = (await http.send("GET", "training_runs?limit=1&offset=0")).json()
            assert runs["cursor"]["total_count"] == 1 and runs["training_runs"] == [run]
            found = (await http.send("GET", f"training_runs/{model}/checkpoints")).json()["checkpoints"]
            assert [(each["checkpoint_id"], each["checkpoint_type"]) for each in found] == [
                ("sampler_weights/b", "sampler"),
                ("weights/a", "training"),
            ]
            assert all(each["size_bytes"] > 1000 and not each["public"] for each in found)
            everything = (await http.send("GET", "checkpoints?limit=1&offset=1")).json()
            assert everything["checkpoints"] == found[1:] and everything["cursor"]["total_count"] == 2
            other = await http.session()
            create = {"session_id": other, "model_seq_id": 0, "path": found[1]["tinker_path"], "optimizer": True}
            assert (await http.result(await http.post("load_weights", create)))["model_id"] == f"{other}:train:0"
            lost = await http.refused("optim_step", {"model_id": model, "seq_id": 99}, status=404)
            assert f"its last checkpoint is tinker://{model}/weights/a" in lost

    asyncio.run(main())


def test_checkpoints_are_published_deleted_and_expire(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, seq = await trained(http, 1)
            for i, name in enumerate("abc"):
                await http.result(await http.post("save_weights", {"model_id": model, "seq_id": seq + i, "path": name}))
            at = f"training_runs/{model}/checkpoints/weights"
            for method, path, json in (
                ("POST", f"{at}/a/publish", None),
                ("PUT", f"{at}/b/ttl", {"ttl_seconds": 1}),
                ("DELETE", f"{at}/c", None),
            ):
                response = await http.send(method, path, json)
                assert (response.status_code, response.content) == (204, b""), path
            found = (await http.send("GET", f"training_runs/{model}/checkpoints")).json()["checkpoints"]
            assert [(each["checkpoint_id"], each["public"], "expires_at" in each) for each in found] == [
                ("weights/b", False, True),
                ("weights/a", True, False),
            ]
            await asyncio.sleep(1.1)
            remove_expired(http.state)
            assert [each.path.name for each in store.checkpoints("local")] == ["a"]
            assert (await http.send("DELETE", f"{at}/a/publish")).status_code == 204
            assert (await http.send("DELETE", f"{at}/c")).status_code == 404
            assert await http.refused("weights_info", {"tinker_path": f"tinker://{model}/weights/c"}, status=404)
            again = {"model_id": model, "seq_id": seq + 3, "path": "c"}
            assert "path" in await http.result(await http.post("save_weights", again))

    asyncio.run(main())


def test_an_adapter_is_downloaded_through_signed_addresses(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, seq = await trained(http, 1)
            names = (
                ("save_weights_external", "x", "external_weights"),
                ("save_weights_for_sampler", "s", "sampler_weights"),
            )
            for i, (call, name, kind) in enumerate(names):
                body = {"model_id": model, "seq_id": seq + i, "path": name}
                saved = await http.result(await http.post(call, body))
                assert saved["path"] == f"tinker://{model}/{kind}/{name}"
            at = f"training_runs/{model}/checkpoints"
            urls = (await http.send("GET", f"{at}/external_weights/x/external_weights_urls")).json()["urls"]
            assert sorted(urls) == ["adapter_config.json", "adapter_model.safetensors"]
            weights = load((await http.client.get(urls["adapter_model.safetensors"])).content)
            assert all(np.isfinite(tensor).all() for tensor in weights.values()) and len(weights) > 10
            answer = await http.send("GET", f"{at}/sampler_weights/s/archive")
            assert answer.status_code == 302 and answer.headers["expires"].endswith("GMT")
            packed = await http.client.get(answer.headers["location"])
            with tarfile.open(fileobj=io.BytesIO(packed.content)) as tar:
                assert {"adapter_config.json", "adapter_model.safetensors"} <= set(tar.getnames())
                assert all(member.uid == 0 and "/" not in member.name for member in tar)
            for wrong in (
                urls["adapter_config.json"][:-2],
                f"{urls['adapter_config.json']}x",
                "http://localhost/api/v1/files/x",
            ):
                assert (await http.client.get(wrong)).status_code == 403
            key = (await http.post("auth/token", {}))["jwt"]
            assert (await http.client.get(f"http://localhost/api/v1/files/{key}")).status_code == 403
            old = (await http.send("GET", "checkpoints", User_Agent="AsyncTinker/Python 0.24.1")).json()["checkpoints"]
            assert {each["checkpoint_type"] for each in old} == {"sampler"}

    asyncio.run(main())


def test_a_refused_call_of_any_kind_names_its_fault_and_uses_up_its_number(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, seq = await trained(http, 1)
            body: dict[str, Any] = {"model_id": model, "path": "x"}
            wrong: tuple[tuple[str, dict[str, Any], str], ...] = (
                ("save_weights", {"path": "../x"}, "path: found the name '../x'"),
                ("save_weights", {"path": None}, "path: is missing"),
                ("save_weights_for_sampler", {"kind": "inflight"}, "kind: found 'inflight'; wanted 'snapshot'"),
                ("save_weights_for_sampler", {"path": None}, "path: is missing"),
                ("save_weights_external", {"age_encryption_recipients": ["age1"]}, "does not encrypt downloads"),
                ("save_weights", {"user_metadata": {"a": "x" * 70_000}}, "limits.metadata_bytes = 65536"),
                ("save_weights", {"ttl_seconds": -1}, "ttl_seconds"),
                ("save_weights", {"path": 3}, "path: "),
                ("load_weights", {"path": "/etc/passwd"}, "path: found '/etc/passwd'"),
                ("load_weights", {"path": 1.5}, "path: "),
                ("optim_step", {"adam_params": {"beta1": 1.0}}, "AdamParams.beta1"),
                ("optim_step", {"adam_params": {"eps": "x"}}, "adam_params.eps"),
                ("optim_step", {"optimizer_params": {"type": "dimuon"}}, "found 'dimuon'"),
                (
                    "forward_backward",
                    {"forward_backward_input": {"data": [{}], "loss_fn": "ppo"}},
                    "data.0.model_input",
                ),
                ("forward_backward", {}, "forward_backward_input: is missing"),
            )
            for i, (call, more, message) in enumerate(wrong):
                assert message in await http.refused(call, {**body, "seq_id": seq + i, **more})
            assert (await http.result(await http.post("forward_backward", pass_body(model, seq + len(wrong)))))[
                "metrics"
            ]

    asyncio.run(main())
