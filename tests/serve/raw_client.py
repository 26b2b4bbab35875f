"""Tinker's API call by call, for tests that compare another API with it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import httpx

from tests.serve.clients import Server

POLLS = 20


class RawClient:
    """One session of one tenant."""

    def __init__(self, server: Server, key: str) -> None:
        self._http = httpx.Client(base_url=f"{server.url}/api/v1", headers={"X-API-Key": key}, timeout=120)
        self.session = self.post("create_session", {"tags": [], "sdk_version": "0.38.0"})["session_id"]
        self._samplers, self._models = itertools.count(), itertools.count()
        self._numbers: dict[str, itertools.count[int]] = {}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        answer = self._http.post(path, json=body)
        return answer.status_code, answer.text

    def post(self, path: str, body: dict[str, Any]) -> Any:
        status, text = self.answer(path, body)
        assert status == 200, f"{path}: {status} {text}"
        return json.loads(text)

    def outcome(self, promise: dict[str, Any]) -> Any:
        """A result, or an error with its category."""
        for _ in range(POLLS):
            status, text = self.answer("retrieve_future", {"request_id": promise["request_id"]})
            if status != 408:
                assert status == 200, text
                return json.loads(text)
        raise AssertionError("no result")

    def result(self, promise: dict[str, Any]) -> Any:
        value = self.outcome(promise)
        assert "error" not in value, value
        return value

    def model(self, base: str, rank: int) -> str:
        return self._model("create_model", {"base_model": base, "lora_config": {"rank": rank, "seed": 1}})

    def model_of(self, path: str) -> str:
        """From a checkpoint, with its optimizer."""
        return self._model("load_weights", {"path": path, "optimizer": True})

    def _model(self, call: str, body: dict[str, Any]) -> str:
        number = next(self._models)
        promise = self.post(call, {"session_id": self.session, "model_seq_id": number, **body})
        model: str = self.result(promise)["model_id"]
        self._numbers[model] = itertools.count(1)
        return model

    def call(self, model: str, operation: str, **body: Any) -> dict[str, Any]:
        """A promise. Calls of a model take effect in order."""
        return dict(self.post(operation, {"model_id": model, "seq_id": next(self._numbers[model]), **body}))

    def train(self, model: str, rows: Sequence[tuple[list[int], list[int]]], steps: int, rate: float) -> None:
        """Supervised steps on (prompt, completion)."""
        rows_of_each = batch(rows)
        promises = []
        for _ in range(steps):
            promises.append(self.call(model, "forward_backward", forward_backward_input=rows_of_each))
            promises.append(self.call(model, "optim_step", adam_params={"learning_rate": rate}))
        for promise in promises:
            self.result(promise)

    def save(self, model: str, name: str) -> str:
        """Path of a sampler checkpoint."""
        path: str = self.result(self.call(model, "save_weights_for_sampler", path=name))["path"]
        return path

    def sampler(self, **source: str) -> str:
        body = {"session_id": self.session, "sampling_session_seq_id": next(self._samplers), **source}
        sampler: str = self.post("create_sampling_session", body)["sampling_session_id"]
        self._numbers[sampler] = itertools.count(0)
        return sampler

    def asample(self, sampler: str, prompt: Sequence[int], **body: Any) -> dict[str, Any]:
        """A promise."""
        chunks = {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]}
        number = next(self._numbers[sampler])
        return dict(self.post("asample", {"sampling_session_id": sampler, "seq_id": number, "prompt": chunks, **body}))

    def sample(self, sampler: str, prompt: Sequence[int], n: int = 1, **body: Any) -> Any:
        return self.result(self.asample(sampler, prompt, num_samples=n, **body))


def batch(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """The input of a supervised pass on (prompt, completion)."""
    return {"data": [_datum(prompt, completion) for prompt, completion in rows], "loss_fn": "cross_entropy"}


def _datum(prompt: list[int], completion: list[int]) -> dict[str, Any]:
    ids = [*prompt, *completion]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
    inputs = {
        "target_tokens": {"data": ids[1:], "dtype": "int64", "shape": [len(weights)]},
        "weights": {"data": weights, "dtype": "float32", "shape": [len(weights)]},
    }
    return {"model_input": {"chunks": [{"type": "encoded_text", "tokens": ids[:-1]}]}, "loss_fn_inputs": inputs}
