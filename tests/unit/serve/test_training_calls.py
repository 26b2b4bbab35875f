"""Training over HTTP: order, retries, refusals, and the same numbers as the learner's own."""

from __future__ import annotations

import asyncio
import itertools
import random

import numpy as np
import pyarrow as pa
import pytest

from rlsys import losses
from rlsys.config import LoraSection
from rlsys.datums import collate
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.outcomes import FAILED_PARTS
from rlsys.serve.wire import messages
from rlsys.types import AdamParams, Datum, ModelInput
from tests.unit.serve.http_client import PROTOBUF, Http, as_protobuf, datum, pass_body
from tests.unit.serve.learner_backend import LearnerBackend

SHORT = Limits(poll_s=0.2)


def zstd(body: bytes) -> bytes:
    return pa.compress(body, codec="zstd", asbytes=True)


def test_json_protobuf_and_zstd_are_the_same_bits(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            found = []
            for seq, encoding in enumerate(("json", "protobuf", "zstd"), start=1):
                body = pass_body(model, seq, 3)
                if encoding == "json":
                    promise = await http.post("forward_backward", body)
                else:
                    raw = as_protobuf(body)
                    headers = dict(PROTOBUF) if encoding == "protobuf" else {**PROTOBUF, "Content-Encoding": "zstd"}
                    response = await http.send(
                        "POST", "forward_backward", content=raw if encoding == "protobuf" else zstd(raw), **headers
                    )
                    assert response.status_code == 200, response.text
                    promise = response.json()
                as_json = await http.result(promise)
                answer = await http.send(
                    "POST", "retrieve_future", {"request_id": promise["request_id"]}, Accept="application/x-protobuf"
                )
                assert answer.headers["content-type"] == "application/x-protobuf"
                message = messages.ForwardBackwardOutput()
                message.ParseFromString(answer.content)
                (record,) = message.loss_fn_outputs
                values = np.frombuffer(record.fields["logprobs"].data, "<f4")
                offsets = np.frombuffer(record.fields["logprobs"].offsets, "<i8")
                assert record.num_datums == 3 and offsets.tolist() == [0, 16, 36, 60]
                flat = [x for output in as_json["loss_fn_outputs"] for x in output["logprobs"]["data"]]
                assert values.tobytes() == np.array(flat, np.float32).tobytes()
                assert dict(message.metrics) == as_json["metrics"]
                found.append((values.tobytes(), as_json["metrics"]))
            assert found[0] == found[1] == found[2]

    asyncio.run(main())


def test_a_step_over_http_is_the_learners_step(backend: LearnerBackend, store: CheckpointStore) -> None:
    body = pass_body("", 1, 4)["forward_backward_input"]
    data = [
        Datum(
            ModelInput.from_ints(each["model_input"]["chunks"][0]["tokens"]),
            {key: np.array(tensor["data"]) for key, tensor in each["loss_fn_inputs"].items()},
        )
        for each in body["data"]
    ]
    loss, learner = losses.resolve("cross_entropy"), backend.host.learner
    learner.runs.create("direct", LoraSection(rank=4, alpha=32.0, train_unembed=True), 1)
    batch = collate(data, loss, vocab_size=64, max_length=64)
    wanted = []
    for _ in range(3):
        wanted.append(learner.forward_backward("direct", batch, loss).loss_sum)
        learner.optim_step("direct", AdamParams(learning_rate=1e-2))
    learner.runs.drop("direct")

    async def main() -> list[float]:
        async with Http(backend, store) as http:
            model, found = await http.model(await http.session()), []
            for step in range(3):
                promise = await http.forward_backward(model, 2 * step + 1, 4)
                await http.optim_step(model, 2 * step + 2)
                found.append((await http.result(promise))["metrics"]["loss:sum"])
            return found

    assert asyncio.run(main()) == wanted


@pytest.mark.parametrize("seed", range(5))
def test_calls_take_effect_in_the_order_of_their_numbers(
    seed: int, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            operations = {
                1: "forward_backward",
                2: "forward_backward",
                3: "optim_step",
                4: "forward_backward",
                5: "optim_step",
            }
            numbers = list(operations)
            random.Random(seed).shuffle(numbers)
            promises = {}
            for number in numbers:
                call = http.forward_backward if operations[number] == "forward_backward" else http.optim_step
                promises[number] = await call(model, number)
            results = [await http.result(promises[number]) for number in sorted(numbers)]
            assert all("error" not in result for result in results), results
            assert [op for run, op in backend.done if run == model] == list(operations.values())

    asyncio.run(main())


def test_a_repeated_call_is_the_same_operation_also_while_the_first_waits(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            step = await http.optim_step(model, 2)  # waits for number 1
            again = await http.optim_step(model, 2)
            bodies = [http.forward_backward(model, 1) for _ in range(4)]
            first, *rest = await asyncio.gather(*bodies)
            await http.result(first)
            await http.result(step)
            late = await http.post("forward_backward", pass_body(model, 1, 5))  # another body: the number decides
            assert again == step and all(each == first for each in [*rest, late])
            assert [op for run, op in backend.done if run == model] == ["forward_backward", "optim_step"]
            create = {"session_id": model.split(":")[0], "model_seq_id": 0, "base_model": "tiny"}
            assert (await http.result(await http.post("create_model", create)))["model_id"] == model

    asyncio.run(main())


def test_a_refused_call_has_used_up_its_number_and_is_refused_again(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            wrong = pass_body(model, 2)
            wrong["forward_backward_input"]["data"][1]["loss_fn_inputs"]["target_tokens"]["data"][0] = 64
            promises = [await http.forward_backward(model, 1)]
            text = await http.refused("forward_backward", wrong)
            assert (
                text == "datum 1: loss_fn_inputs['target_tokens']: found 64 at position 0; "
                "wanted ids from 0 to 63, the model's vocabulary"
            )
            assert await http.refused("forward_backward", pass_body(model, 2)) == text
            promises += [await http.forward_backward(model, 3), await http.optim_step(model, 4)]
            results = [await http.result(promise) for promise in promises]
            assert results[2]["metrics"][FAILED_PARTS] == 1 and results[2]["metrics"]["grad_norm"] > 0
            await http.forward_backward(model, 5)
            clean = await http.result(await http.optim_step(model, 6))
            assert FAILED_PARTS not in clean["metrics"]

    asyncio.run(main())


def test_a_step_without_a_gradient_fails_for_the_user_and_poisons_nothing(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            failed = await http.result(await http.optim_step(model, 1))
            assert failed["category"] == "user" and "no forward_backward since the last optim_step" in failed["error"]
            await http.forward_backward(model, 2)
            assert (await http.result(await http.optim_step(model, 3)))["metrics"]["grad_norm"] > 0

    asyncio.run(main())


def test_a_gap_fails_the_waiting_call_once_and_late_numbers_never_run(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(gap_s=0.3)) as http:
            model = await http.model(await http.session())
            await http.result(await http.forward_backward(model, 1))
            behind = await http.forward_backward(model, 3)
            step = await http.optim_step(model, 4)
            await asyncio.sleep(0.4)
            http.state.models[model].queue.close_overdue()
            failed = await http.result(behind)
            assert failed == {
                "error": "call 2 of this model never arrived: its client gave up; reload the last checkpoint",
                "category": "user",
            }
            assert (await http.result(step))["metrics"][FAILED_PARTS] == 2
            late = await http.result(await http.forward_backward(model, 2))
            assert late == failed
            assert [op for run, op in backend.done if run == model] == ["forward_backward", "optim_step"]

    asyncio.run(main())


def test_a_poll_is_held_and_then_says_not_yet(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store, SHORT) as http:
            model = await http.model(await http.session())
            backend.open.clear()
            promise = await http.forward_backward(model, 1)
            began = asyncio.get_running_loop().time()
            answers = await asyncio.gather(
                *(http.send("POST", "retrieve_future", {"request_id": promise["request_id"]}) for _ in range(3))
            )
            assert 0.2 <= asyncio.get_running_loop().time() - began < 2
            assert [(each.status_code, each.json()["queue_state"]) for each in answers] == [(408, "active")] * 3
            backend.open.set()
            first, second = await http.result(promise), await http.result(promise)
            assert first == second and first["metrics"]["loss:sum"] > 0

    asyncio.run(main())


def test_chunks_add_up_to_the_batch(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def norm(http: Http, number: int, sizes: list[int]) -> tuple[float, float]:
        session = await http.session()
        model, whole, total = await http.model(session), pass_body("", 0, 8)["forward_backward_input"]["data"], 0.0
        starts = itertools.accumulate(sizes, initial=0)
        for seq, (start, size) in enumerate(zip(starts, sizes, strict=False), start=1):
            inner = {"data": whole[start : start + size], "loss_fn": "cross_entropy"}
            promise = await http.post(
                "forward_backward", {"model_id": model, "seq_id": seq, "forward_backward_input": inner}
            )
            total += (await http.result(promise))["metrics"]["loss:sum"]
        step = await http.result(await http.optim_step(model, len(sizes) + 1))
        return total, step["metrics"]["grad_norm"]

    async def main() -> None:
        async with Http(backend, store) as http:
            one, two, eight = [await norm(http, i, sizes) for i, sizes in enumerate(([8], [4, 4], [1] * 8))]
            assert two == pytest.approx(one, rel=1e-6) and eight == pytest.approx(one, rel=1e-6)

    asyncio.run(main())


def test_several_targets_per_position_are_a_sum_over_both(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            tokens, targets = [1, 2, 3], [[4, 5], [6, 7], [8, 9]]
            weights = [[1.0, 0.0], [0.25, 0.75], [0.5, -0.5]]
            wide = {
                "model_input": {"chunks": [{"tokens": tokens[:1]}, {"tokens": tokens[1:]}]},
                "loss_fn_inputs": {
                    "target_tokens": {"data": list(itertools.chain(*targets)), "dtype": "int64", "shape": [3, 2]},
                    "weights": {
                        "data": [1.0, 0.25, 0.75, 0.5, -0.5],
                        "dtype": "float32",
                        "shape": [3, 2],
                        "sparse_crow_indices": [0, 1, 3, 5],
                        "sparse_col_indices": [0, 0, 1, 0, 1],
                    },
                },
            }
            narrow = [
                {
                    "model_input": {"chunks": [{"tokens": tokens}]},
                    "loss_fn_inputs": {"target_tokens": {"data": [row[k] for row in targets], "dtype": "int64"}},
                }
                for k in range(2)
            ]
            found = []
            for seq, data in enumerate(([wide, datum(3)], [*narrow, datum(3)]), start=1):
                body = {
                    "model_id": model,
                    "seq_id": seq,
                    "forward_backward_input": {"data": data, "loss_fn": "cross_entropy"},
                }
                found.append(await http.result(await http.post("forward_backward", body)))
            both = np.array([output["logprobs"]["data"] for output in found[1]["loss_fn_outputs"][:2]]).T
            output = found[0]["loss_fn_outputs"][0]["logprobs"]
            assert output["shape"] == [3, 2]
            np.testing.assert_allclose(np.array(output["data"]).reshape(3, 2), both, rtol=1e-5)
            rest = -np.sum(found[1]["loss_fn_outputs"][2]["logprobs"]["data"])
            assert found[0]["metrics"]["loss:sum"] == pytest.approx(-(np.array(weights) * both).sum() + rest, rel=1e-5)

    asyncio.run(main())


def test_unknown_inputs_and_fields_are_ignored_and_nulls_are_missing(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            body = pass_body(model, 1)
            body["novel"] = body["forward_backward_input"]["later"] = {"a": 1}
            body["forward_backward_input"]["loss_fn_config"] = None
            body["forward_backward_input"]["data"][0]["loss_fn_inputs"]["mask"] = {
                "data": [1.0],
                "dtype": "float32",
                "shape": [1],
            }
            assert (await http.result(await http.post("forward_backward", body)))["metrics"]["loss:sum"] > 0
            step = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 1e-3, "beta1": None}, "type": None}
            assert (await http.result(await http.post("optim_step", step)))["metrics"]["grad_norm"] > 0

    asyncio.run(main())
