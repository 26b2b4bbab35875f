"""The smallest client of `rlsys serve`: one connection, JSON or protobuf bodies, no SDK."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any  # JSON, and protobuf classes made at run time
from urllib.parse import urlsplit

from benchmarks import serve_calls as calls
from rlsys.serve.wire import messages
from rlsys.serve.wire.results import JSON, PROTOBUF

POLL_AGAIN = 408


class Http:
    """A session over one connection."""

    def __init__(self, url: str, key: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=calls.LIMIT_S)
        self._key = key
        self._sequence = 0
        self.session: str = self.ask("create_session", {"tags": [], "sdk_version": "0"})["session_id"]

    def model(self, base: str) -> str:
        """A new adapter."""
        body = {
            "session_id": self.session,
            "model_seq_id": 0,
            "base_model": base,
            "lora_config": {"rank": calls.RANK, "seed": 1},
        }
        found = self.result(self.ask("create_model", body)["request_id"])
        return str(json.loads(found)["model_id"])

    def sampler(self, base: str) -> str:
        body = {"session_id": self.session, "sampling_session_seq_id": 0, "base_model": base}
        return str(self.ask("create_sampling_session", body)["sampling_session_id"])

    def one_pass(self, message: Any) -> float:
        """Seconds of one forward_backward. The body is a protobuf message without its number, uncompressed."""
        began = time.perf_counter()
        self._sequence += 1
        message.seq_id = self._sequence
        promised = self._post("forward_backward", message.SerializeToString(), PROTOBUF)
        found = messages.ForwardBackwardOutput.FromString(self.result(promised["request_id"]))
        taken = time.perf_counter() - began
        if sum(each.num_datums for each in found.loss_fn_outputs) != calls.DATUMS:
            raise SystemExit(f"forward_backward: found {len(found.loss_fn_outputs)} outputs; wanted {calls.DATUMS}")
        return taken

    def one_token(self, sampler: str, number: int) -> float:
        """Seconds of a sample of one token."""
        began = time.perf_counter()
        prompt = {"chunks": [{"tokens": calls.prompts(0)[0]}]}
        params = {"max_tokens": 1, "temperature": 1.0}
        body = {"sampling_session_id": sampler, "seq_id": number, "prompt": prompt, "sampling_params": params}
        found = messages.SampleResponse.FromString(self.result(self.ask("asample", body)["request_id"]))
        taken = time.perf_counter() - began
        if len(found.sequences) != 1 or len(found.sequences[0].tokens) != 4:
            raise SystemExit(f"asample: found {found}; wanted one token")
        return taken

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        return self._post(path, json.dumps(body).encode(), JSON)

    def result(self, request_id: str) -> bytes:
        """Body of the result of a promise, which is held until it is there."""
        while True:
            status, body = self._send("retrieve_future", json.dumps({"request_id": request_id}).encode(), JSON)
            if status == http.client.OK and not body.startswith(b'{"error"'):
                return body
            if status != POLL_AGAIN:
                raise SystemExit(f"retrieve_future: {status} {body[:300]!r}")

    def _post(self, path: str, body: bytes, media_type: str) -> Any:
        status, found = self._send(path, body, media_type)
        if status != http.client.OK:
            raise SystemExit(f"{path}: {status} {found[:300]!r}")
        return json.loads(found)

    def _send(self, path: str, body: bytes, media_type: str) -> tuple[int, bytes]:
        headers = {"X-API-Key": self._key, "Content-Type": media_type, "Accept": f"{PROTOBUF}, {JSON}"}
        self._connection.request("POST", f"/api/v1/{path}", body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()


def supervised(model: str) -> Any:
    """The batch of `serve_calls.batch` as a protobuf body without its number."""
    message = messages.ForwardBackwardRequest(model_id=model, loss_fn="cross_entropy")
    for inputs, targets in zip(*calls.batch(), strict=True):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = inputs.astype("<i4").tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = targets.astype("<i8").tobytes(), messages.INT64
        target.shape.append(calls.LENGTH)
        weights = datum.loss_fn_inputs["weights"]
        weights.dense, weights.dtype = b"\x00\x00\x80\x3f" * calls.LENGTH, messages.FLOAT32
        weights.shape.append(calls.LENGTH)
    return message
