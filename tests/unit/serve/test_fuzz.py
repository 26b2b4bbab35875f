"""Malformed requests, generated: each gets a 4xx with the error's form at once, and nothing changes for anybody.

`SERVE_FUZZ_REQUESTS` sets their number.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from rlsys.serve.checkpoints import CheckpointStore
from tests.unit.serve.http_client import PROTOBUF, Http, as_protobuf, pass_body
from tests.unit.serve.learner_backend import LearnerBackend
from tests.unit.serve.test_sessions import sample_body, sampler_of

REQUESTS = int(os.environ.get("SERVE_FUZZ_REQUESTS", "4000"))
ROOT = Path(__file__).parents[3]
SECONDS = 1.0
HANGING_S = 60.0
VALUES: list[Any] = [
    *[None, True, False, 0, -1, 1.5, 1e308, -1e308, 2**31, 2**53 + 1, 2**63, -(2**63), 10**400, 1e-320],
    *[
        "",
        "0",
        "NaN",
        "\0",
        "x" * 5000,
        "../../etc/passwd",
        "\ud83d\ude00",
        "tinker://a/b/c",
        "%00",
        "'; --",
        "${jndi:x}",
    ],
    *[
        [],
        [[]],
        [None],
        [[[[1]]]],
        {},
        {"": {}},
        {"__proto__": 1},
        [1, "a"],
        [True],
        [1e400],
        [2**64],
        [-1],
        [0] * 3000,
    ],
]
RAW = [
    *[
        b"",
        b"{",
        b"[",
        b"null",
        b"true",
        b"0",
        b'"a"',
        b"[]",
        b"{}{}",
        b"\xff\xfe{}",
        b"{\x00}",
        b"\xef\xbb\xbf{}",
        b"{'a': 1}",
    ],
    *[b"[" * 100_000, b'{"a":' * 50_000, b'{"model_id": NaN}', b'{"seq_id": Infinity}', b'{"seq_id": 1e999}'],
    *[b'{"model_id": "a", "model_id": "b"}', b'{"a": 1,}', b"{} x", b'{"seq_id": 1' + b"0" * 5000 + b"}", b'"\\ud800"'],
    *[b'{"\\ud800": 1}', b"\x00" * 1000, b"<xml/>", b"a=1&b=2", b"--x\r\nContent-Disposition: form-data\r\n\r\n1"],
]
HEADERS: list[dict[str, str]] = [
    {}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-protobuf"}, {"Content-Encoding": "gzip"},
    {"Content-Encoding": "zstd"}, {"Content-Type": "application/json; charset=utf-16"}, {"Content-Encoding": "zstd,x"},
    {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Type": ""}, {"Content-Type": "\x01"},
]  # fmt: skip

Body = dict[str, Any]


def bodies(session: str, model: str, sampler: str, promise: str) -> dict[str, Body]:
    """A right body of each call. Numbers are far ahead: a mutation that stays right must not be the next call."""
    ahead = {"model_id": model, "seq_id": 5000}
    return {
        "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0", "display_name": "x"},
        "session_heartbeat": {"session_id": session},
        "create_model": {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tiny",
            "lora_config": {"rank": 4, "seed": 1},
        },
        "get_info": {"model_id": model},
        "forward_backward": pass_body(model, 5000, 2, "ppo", loss_fn_config={"clip_low_threshold": 0.9}),
        "forward": {**ahead, "forward_input": pass_body(model, 1)["forward_backward_input"]},
        "optim_step": {
            **ahead,
            "adam_params": {"learning_rate": 1e-3, "beta1": 0.9, "eps": 1e-8, "grad_clip_norm": 1.0},
        },
        "save_weights": {**ahead, "path": "name", "ttl_seconds": 10, "overwrite": False},
        "save_weights_for_sampler": {**ahead, "sampling_session_seq_id": 3},
        "save_weights_external": {**ahead, "path": "name"},
        "load_weights": {**ahead, "path": f"tinker://{model}/weights/none", "optimizer": True},
        "create_sampling_session": {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"},
        "asample": sample_body(sampler, 7, num_samples=2, prompt_logprobs=True, topk_prompt_logprobs=2),
        "retrieve_future": {"request_id": promise, "allow_metadata_only": True},
        "cancel_future": {"request_id": promise},
        "weights_info": {"tinker_path": f"tinker://{model}/weights/none"},
        "sessions/search": {"limit": 3, "statuses": ["active"]},
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of a list the first and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*path, key))
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from places(value[index], (*path, index))


def mutated(body: Body, draw: random.Random) -> bytes:
    """The body with one to three places changed, or broken as text."""
    changed = copy.deepcopy(body)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        *path, last = draw.choice(list(places(changed)) or [("a",)])
        inner: Any = changed
        for key in path:
            inner = inner[key]
        if draw.random() < 0.15 and isinstance(inner, dict):
            inner.pop(last, None)
        else:
            inner[last] = copy.deepcopy(draw.choice(VALUES))
    text = json.dumps(changed).encode("utf-8", "surrogatepass")
    if draw.random() < 0.2:
        at = draw.randrange(len(text))
        text = draw.choice([text[:at], text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :], text + text[:at]])
    return text


def broken_protobuf(body: Body, draw: random.Random) -> tuple[bytes, dict[str, str]]:
    raw = bytearray(as_protobuf(body))
    for _ in range(draw.choice([1, 2, 8, 40])):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    kind = draw.randrange(4)
    content = bytes(raw[: draw.randrange(len(raw))]) if kind == 0 else draw.randbytes(300) if kind == 1 else bytes(raw)
    headers = dict(PROTOBUF)
    if draw.random() < 0.3:
        content = pa.compress(content, codec="zstd", asbytes=True)
        content = content[: draw.randrange(1, len(content) + 1)]
        headers["Content-Encoding"] = "zstd"
    return content, headers


def requests(known: dict[str, Body], draw: random.Random) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    kinds: list[Callable[[], tuple[str, bytes, dict[str, str]]]] = [
        lambda: (path := draw.choice(list(known)), mutated(known[path], draw), {}),
        lambda: (draw.choice(list(known)), draw.choice(RAW), draw.choice(HEADERS)),
        lambda: ("forward_backward", *broken_protobuf(known["forward_backward"], draw)),
        lambda: (draw.choice(list(known)), draw.randbytes(draw.randrange(200)), draw.choice(HEADERS)),
    ]
    for _ in range(REQUESTS):
        yield draw.choices(kinds, [6, 1, 3, 1])[0]()


def done_of(backend: LearnerBackend, model: str) -> int:
    return sum(each == model for each, _ in backend.done)


async def work(http: Http, model: str, stop: asyncio.Event) -> int:
    """What a program does beside them, until told to stop. Returns the number of its steps; each must succeed."""
    steps = 0
    while not stop.is_set():
        promise = await http.forward_backward(model, 2 * steps + 1)
        step = await http.optim_step(model, 2 * steps + 2)
        assert (await http.result(promise))["metrics"]["loss:sum"] != 0
        assert (await http.result(step))["metrics"]["grad_norm"] > 0
        steps += 1
        await asyncio.sleep(0.01)
    return steps


def test_malformed_requests_are_refused_at_once_and_change_nothing(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> Counter[int]:
        draw, found = random.Random(17), Counter[int]()
        async with Http(backend, store) as http:
            session = await http.session()
            model, sampler = await http.model(session), await sampler_of(http, session)
            promise = (await http.forward_backward(model, 1))["request_id"]
            await http.result({"request_id": promise})
            before = {name: weight.clone() for name, weight in backend.host.learner.runs[model].parameters.items()}
            operations = done_of(backend, model)
            stop = asyncio.Event()
            beside = asyncio.create_task(work(http, await http.model(session, 1), stop))
            memory = psutil.Process().memory_info().rss
            for path, content, headers in requests(bodies(session, model, sampler, promise), draw):
                began, computed = time.monotonic(), time.process_time()
                response = await http.send("POST", path, content=content, **headers)
                seconds = time.process_time() - computed  # a busy machine takes longer
                shown = (path, response.status_code, content[:300], headers, response.text[:300])
                assert seconds < SECONDS and time.monotonic() - began < HANGING_S, (seconds, *shown)
                assert response.status_code < 500, shown
                if response.status_code >= 400:
                    assert isinstance(response.json()["detail"], str) and response.json()["detail"], shown
                    assert int(response.headers["content-length"]) == len(response.content) > 0
                    assert str(ROOT) not in response.text and str(store.root) not in response.text, shown
                found[response.status_code] += 1
            stop.set()
            assert await beside > 20, "the client beside them did not advance"
            gc.collect()
            assert psutil.Process().memory_info().rss - memory < 300 * 2**20
            assert done_of(backend, model) == operations, "a malformed request reached the learner"
            after = backend.host.learner.runs[model].parameters
            assert all(np.array_equal(after[name].detach(), before[name].detach()) for name in before)
            assert store.checkpoints("local") == []
            step = await http.result(await http.optim_step(model, 2))
            assert step["metrics"]["grad_norm"] > 0
        return found

    found = asyncio.run(main())
    assert found[400] > 0.6 * REQUESTS and found[200] < 0.3 * REQUESTS, found
