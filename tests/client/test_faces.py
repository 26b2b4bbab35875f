"""What each call of the three clients returns, in its plain and its _async form."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import rlsys
from rlsys import types
from tests.waiting import FAR_S

FUTURE, CLIENT, VALUE = "a future", "a client", "a value"
PROMPT = types.ModelInput.from_ints([5, 900, 31_000])
FEW = types.SamplingParams(max_tokens=2)
ADAM = types.AdamParams(learning_rate=0.0)


def square(data: list[Any], logprobs: list[Any]) -> Any:
    return sum((logp**2).sum() for logp in logprobs), {}


# method, arguments, what the plain form returns, what awaiting the _async form yields
TRAINING: list[tuple[str, Callable[[Any, str], tuple[Any, ...]], str, str | None]] = [
    ("forward", lambda datum, path: ([datum], "cross_entropy"), FUTURE, FUTURE),
    ("forward_backward", lambda datum, path: ([datum], "cross_entropy"), FUTURE, FUTURE),
    ("forward_backward_custom", lambda datum, path: ([datum], square), FUTURE, FUTURE),
    ("optim_step", lambda datum, path: (ADAM,), FUTURE, FUTURE),
    ("save_state", lambda datum, path: ("again", None, True), FUTURE, FUTURE),
    ("load_state", lambda datum, path: (path,), FUTURE, FUTURE),
    ("load_state_with_optimizer", lambda datum, path: (path,), FUTURE, FUTURE),
    ("save_weights_for_sampler", lambda datum, path: ("again", None, True), FUTURE, FUTURE),
    ("save_weights_and_get_sampling_client", lambda datum, path: (), CLIENT, CLIENT),
    ("get_info", lambda datum, path: (), VALUE, VALUE),
    ("get_tokenizer", lambda datum, path: (), VALUE, None),
]
SAMPLING: list[tuple[str, tuple[Any, ...], str, str | None]] = [
    ("sample", (PROMPT, 1, FEW), FUTURE, VALUE),
    ("compute_logprobs", (PROMPT,), FUTURE, VALUE),
    ("get_tokenizer", (), VALUE, None),
]
SERVICE: list[tuple[str, Callable[[str], tuple[Any, ...]], str, str | None]] = [
    ("create_lora_training_client", lambda path: ("tiny", 2), CLIENT, CLIENT),
    ("create_training_client_from_state", lambda path: (path,), CLIENT, CLIENT),
    ("create_training_client_from_state_with_optimizer", lambda path: (path,), CLIENT, CLIENT),
    ("create_sampling_client", lambda path: (path,), CLIENT, CLIENT),
    ("get_server_capabilities", lambda path: (), VALUE, VALUE),
]


def kind(returned: Any) -> str:
    if isinstance(returned, rlsys.TrainingClient | rlsys.SamplingClient):
        return CLIENT
    return FUTURE if isinstance(returned, rlsys.ApiFuture) else VALUE


def check(client: Any, method: str, arguments: tuple[Any, ...], plain: str, awaited: str | None) -> None:
    returned = getattr(client, method)(*arguments)
    assert kind(returned) == plain
    if plain == FUTURE:
        value = returned.result(timeout=FAR_S)
        assert kind(value) == VALUE
        assert asyncio.run(_await(returned)) is value  # one answer, however it is asked for
    if plain == CLIENT:
        assert returned.result() is returned
        assert asyncio.run(_await(returned)) is returned
    if awaited is None:
        assert not hasattr(client, f"{method}_async")
        return
    face = getattr(client, f"{method}_async")
    assert inspect.iscoroutinefunction(face)
    assert inspect.signature(face).parameters == inspect.signature(getattr(client, method)).parameters

    async def twice() -> None:
        yielded = await face(*arguments)
        assert kind(yielded) == awaited
        if awaited == FUTURE:
            assert kind(await yielded.result_async()) == VALUE

    asyncio.run(twice())


async def _await(awaitable: Any) -> Any:
    return await awaitable


@pytest.fixture(scope="module")
def saved(service: rlsys.ServiceClient) -> tuple[rlsys.TrainingClient, str]:
    client = service.create_lora_training_client("tiny", rank=2)
    return client, client.save_state("faces").result(FAR_S).path


@pytest.mark.parametrize("row", TRAINING, ids=lambda row: row[0])
def test_training_clients_have_the_faces_of_the_tinker_sdk(
    row: Any, saved: tuple[rlsys.TrainingClient, str], datum: types.Datum
) -> None:
    method, arguments, plain, awaited = row
    client, path = saved
    if method == "optim_step":
        for _ in range(2):
            client.forward_backward([datum], "cross_entropy")
            client.optim_step(ADAM).result(FAR_S)
        client.forward_backward([datum], "cross_entropy")
        assert kind(client.optim_step(ADAM)) == plain
        client.forward_backward([datum], "cross_entropy")

        async def step() -> None:
            future = await client.optim_step_async(ADAM)
            assert kind(future) == awaited
            await future

        asyncio.run(step())
        return
    check(client, method, arguments(datum, path), plain, awaited)


@pytest.mark.parametrize("row", SAMPLING, ids=lambda row: row[0])
def test_sampling_clients_have_the_faces_of_the_tinker_sdk(row: Any, service: rlsys.ServiceClient) -> None:
    check(service.create_sampling_client(base_model="tiny"), *row)


@pytest.mark.parametrize("row", SERVICE, ids=lambda row: row[0])
def test_service_clients_have_the_faces_of_the_tinker_sdk(
    row: Any, service: rlsys.ServiceClient, saved: tuple[rlsys.TrainingClient, str]
) -> None:
    method, arguments, plain, awaited = row
    check(service, method, arguments(saved[1]), plain, awaited)


def test_the_table_names_every_public_method() -> None:
    for client, rows in (
        (rlsys.TrainingClient, TRAINING),
        (rlsys.SamplingClient, SAMPLING),
        (rlsys.ServiceClient, SERVICE),
    ):
        found = {name for name, _ in inspect.getmembers(client, inspect.isfunction) if not name.startswith("_")}
        plain = {name.removesuffix("_async") for name in found} - {"result", "close"}  # futures and the end
        assert plain == {row[0] for row in rows}
