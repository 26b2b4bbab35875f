"""A client of the HTTP layer without a network: what an SDK does, call by call."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

import httpx
import numpy as np

from rlsys.serve.app import build_app
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.controller import Controller
from rlsys.serve.front import Front
from rlsys.serve.keys import Keys, NoKeys
from rlsys.serve.signing import Signer, new_secret
from rlsys.serve.state import State
from rlsys.serve.wire import messages
from tests.unit.serve.learner_backend import LearnerBackend

KEY = "tml-one"
PROTOBUF = {"Content-Type": "application/x-protobuf"}


class Http:
    """One application and a client of it, in the event loop of the test."""

    def __init__(
        self, backend: LearnerBackend, store: CheckpointStore, limits: Limits | None = None, keys: Keys | None = None
    ) -> None:
        self.state = State(backend, limits or Limits(), store)
        self.backend = backend
        self.controller = Controller(self.state)
        self.door = self.controller.door
        self.front = Front(self.controller, self.state.limits, backend.bases, Signer(new_secret()))
        self.app = build_app(self.front, keys or NoKeys())
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.backend.open.set()
        await self.state.drain(20)
        await self.client.aclose()

    async def send(
        self,
        method: str,
        path: str,
        json: Any = None,
        content: bytes | None = None,
        key: str | None = KEY,
        **headers: str,
    ) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            names["X-API-Key"] = key
        url = path if path.startswith("/") else f"/api/v1/{path}"
        if json is not None:
            return await self.client.request(method, url, json=json, headers=names)
        return await self.client.request(method, url, content=content, headers=names)

    async def raw(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None, key: str = KEY
    ) -> tuple[int, str]:
        """(status, text) of a request whose target goes to the application as a socket would bring it: an HTTP client
        rewrites dots and escapes."""
        path, _, query = target.partition("?")
        names = {"host": "localhost", "x-api-key": key, **(headers or {})}
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in names.items()],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
        }
        messages: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        await self.app(scope, receive, send)
        text = b"".join(each.get("body", b"") for each in messages[1:]).decode("utf-8", "replace")
        return int(messages[0]["status"]), text

    async def post(self, path: str, json: Any = None, **more: Any) -> Any:
        """The JSON of an answer that must be 200."""
        response = await self.send("POST", path, json, **more)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.json()

    async def refused(self, path: str, json: Any = None, status: int = 400, **more: Any) -> str:
        """The text of a refusal."""
        response = await self.send("POST", path, json, **more)
        assert response.status_code == status, f"{path}: {response.status_code} {response.text}"
        detail: str = response.json()["detail"]
        return detail

    async def result(self, promise: Mapping[str, Any], **more: Any) -> Any:
        """The promise's result, asked for again as long as it is not ready."""
        for _ in range(3):
            response = await self.send("POST", "retrieve_future", {"request_id": promise["request_id"]}, **more)
            if response.status_code != 408:
                assert response.status_code == 200, response.text
                return response.json()
        raise AssertionError("no result")

    async def session(self, **more: Any) -> str:
        found: str = (await self.post("create_session", {"tags": [], "sdk_version": "0.38.0"}, **more))["session_id"]
        return found

    async def model(self, session: str, number: int = 0, rank: int = 4, **more: Any) -> str:
        body = {
            "session_id": session,
            "model_seq_id": number,
            "base_model": "tiny",
            "lora_config": {"rank": rank, "seed": 1},
        }
        found: str = (await self.result(await self.post("create_model", body, **more), **more))["model_id"]
        return found

    async def forward_backward(self, model: str, seq: int, datums: int = 2, **more: Any) -> Any:
        return await self.post("forward_backward", pass_body(model, seq, datums), **more)

    async def optim_step(self, model: str, seq: int, **more: Any) -> Any:
        return await self.post(
            "optim_step", {"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": 1e-2}}, **more
        )


def datum(length: int = 5, seed: int = 0, **more: list[float]) -> dict[str, Any]:
    tokens = np.random.default_rng(seed).integers(0, 64, length + 1).tolist()
    inputs = {"target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": [length]}}
    inputs |= {key: {"data": value, "dtype": "float32", "shape": [len(value)]} for key, value in more.items()}
    return {"model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]}, "loss_fn_inputs": inputs}


def pass_body(model: str, seq: int, datums: int = 2, loss_fn: str = "cross_entropy", **more: Any) -> dict[str, Any]:
    data = [datum(4 + d % 3, d, weights=[1.0] * (4 + d % 3)) for d in range(datums)]
    return {"model_id": model, "seq_id": seq, "forward_backward_input": {"data": data, "loss_fn": loss_fn, **more}}


def as_protobuf(body: dict[str, Any]) -> bytes:
    """The JSON body's message."""
    inner = body["forward_backward_input"]
    message = messages.ForwardBackwardRequest(
        model_id=body["model_id"], seq_id=body["seq_id"], loss_fn=inner["loss_fn"]
    )
    for key, value in inner.get("loss_fn_config", {}).items():
        message.loss_fn_config[key] = value
    for each in inner["data"]:
        found = message.data.add()
        for chunk in each["model_input"]["chunks"]:
            found.model_input.add().encoded_text.tokens = np.array(chunk["tokens"], "<i4").tobytes()
        for key, tensor in each["loss_fn_inputs"].items():
            is_float = tensor["dtype"] == "float32"
            found.loss_fn_inputs[key].dense = np.array(tensor["data"], "<f4" if is_float else "<i8").tobytes()
            found.loss_fn_inputs[key].dtype = messages.FLOAT32 if is_float else messages.INT64
            found.loss_fn_inputs[key].shape.extend(tensor["shape"])
    encoded: bytes = message.SerializeToString()
    return encoded
