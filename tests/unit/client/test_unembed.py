"""What a client that says nothing of `train_unembed` gets where samplers cannot serve it."""

from __future__ import annotations

import asyncio
import warnings
from concurrent.futures import Future
from typing import Any

import pytest

from rlsys.client.backend import About, ModelHandle
from rlsys.client.service import ServiceClient
from rlsys.config import LoraSection


class Somewhere:
    """A backend with one deployment, which makes runs and does nothing else."""

    def __init__(self, serves_unembed: bool) -> None:
        self.serves_unembed = serves_unembed
        self.made: list[LoraSection] = []
        self.about: About

    def deployment(self, base_model: str) -> Any:
        self.about = About(base_model, "folder", "qwen3", 100, 64, 32, 32.0, self.serves_unembed, {}, None)
        return self

    def create_model(self, lora: LoraSection, seed: int) -> Future[ModelHandle]:
        self.made.append(lora)
        answer: Future[ModelHandle] = Future()
        answer.set_result(ModelHandle(f"run{len(self.made)}", lora))
        return answer

    def base_model_of(self, path: str) -> str:
        raise AssertionError(path)

    def known(self) -> list[About | str]:
        return []

    def drop_model(self, model_id: str, seq: int) -> None: ...

    def close(self) -> None: ...


def test_where_samplers_cannot_serve_it_it_is_off_with_one_warning_of_each_base() -> None:
    backend = Somewhere(serves_unembed=False)
    client = ServiceClient(backend=backend)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        client.create_lora_training_client("a", rank=4)
        client.create_lora_training_client("a", rank=4)
        asyncio.run(client.create_lora_training_client_async("a", rank=4))
        client.create_lora_training_client("b", rank=4)
    said = [str(one.message) for one in told]
    assert [text.partition(":")[0] for text in said] == ["a", "b"]
    assert all("on by default in the Tinker API, but off here" in text for text in said)
    assert [lora.train_unembed for lora in backend.made] == [False] * 4


@pytest.mark.parametrize(
    ("serves", "asked", "wanted"), [(True, None, True), (True, False, False), (False, False, False)]
)
def test_who_can_have_it_or_says_what_they_want_gets_no_warning(serves: bool, asked: bool | None, wanted: bool) -> None:
    backend = Somewhere(serves)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ServiceClient(backend=backend).create_lora_training_client("a", rank=4, train_unembed=asked)
    assert backend.made[0].train_unembed is wanted
