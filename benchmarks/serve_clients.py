"""Many clients of `rlsys serve` in one process: a turn sends all their sample requests at once.

    python -m benchmarks.serve_clients URL KEY MODEL CLIENTS REQUESTS

Each client has its session, its sampling session and its connections. A request is a POST of asample and a poll that is
held until the result is there, as by the SDK.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from benchmarks import serve_calls as calls
from benchmarks.sides import Turn
from rlsys.serve.wire import messages
from rlsys.serve.wire.results import JSON, PROTOBUF

POLL_AGAIN, TOO_MANY = 408, 429


@dataclass
class Client:
    """One client. Keeps count of what it was told."""

    http: aiohttp.ClientSession
    session: str = ""
    sampler: str = ""
    sent: int = 0
    refused: int = 0  # answers after which a client asks again: 429
    failed: int = 0  # any other answer than a result

    async def open(self, model: str) -> None:
        self.session = (await self._json("create_session", {"tags": [], "sdk_version": "0"}))["session_id"]
        body = {"session_id": self.session, "sampling_session_seq_id": 0, "base_model": model}
        self.sampler = (await self._json("create_sampling_session", body))["sampling_session_id"]

    async def sample(self, prompt: list[int]) -> tuple[str, float, int]:
        """Id of the request, seconds until its result, tokens."""
        began, self.sent = time.perf_counter(), self.sent + 1
        params = {"max_tokens": calls.MAX_TOKENS, "temperature": 1.0}
        body: dict[str, Any] = {"sampling_session_id": self.sampler, "seq_id": self.sent, "sampling_params": params}
        body["prompt"] = {"chunks": [{"tokens": prompt}]}
        while True:
            status, found = await self._send("asample", body)
            if status != TOO_MANY:
                break
            self.refused += 1
            await asyncio.sleep(1.0)
        request_id = json.loads(found)["request_id"] if status == 200 else ""
        while status == 200:
            status, found = await self._send("retrieve_future", {"request_id": request_id})
            if status == 200 and found.startswith(b"{"):  # JSON: the request failed
                break
            if status == 200:
                (sequence,) = messages.SampleResponse.FromString(found).sequences
                return request_id, time.perf_counter() - began, len(sequence.tokens) // 4
            if status == POLL_AGAIN:
                status = 200
        self.failed += 1
        print(status, found[:300], file=sys.stderr, flush=True)
        return request_id, time.perf_counter() - began, 0

    async def _json(self, path: str, body: dict[str, Any]) -> Any:
        status, found = await self._send(path, body)
        if status != 200:
            raise SystemExit(f"{path}: {status} {found[:300]!r}")
        return json.loads(found)

    async def _send(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        async with self.http.post(f"/api/v1/{path}", data=json.dumps(body)) as answer:
            return answer.status, await answer.read()


async def all_at_once(clients: Sequence[Client], prompts: Sequence[list[int]]) -> list[tuple[str, float, int]]:
    """The clients share the prompts."""
    return await asyncio.gather(*(clients[i % len(clients)].sample(each) for i, each in enumerate(prompts)))


async def work(url: str, key: str, model: str, count: int, requests: int) -> None:
    headers = {"X-API-Key": key, "Content-Type": JSON, "Accept": f"{PROTOBUF}, {JSON}"}
    limits = aiohttp.ClientTimeout(total=calls.LIMIT_S)
    prompts = calls.many_prompts(requests)
    turn = Turn()
    clients = [
        Client(aiohttp.ClientSession(url, headers=headers, timeout=limits, connector=aiohttp.TCPConnector(limit=0)))
        for _ in range(count)
    ]
    try:
        for client in clients:
            await client.open(model)
        await all_at_once(clients, prompts[: calls.FIRST_REQUESTS])
        turn.over()
        while True:
            turn.wait()
            began, cpu = time.perf_counter(), time.process_time()
            answers = await all_at_once(clients, prompts)
            seconds = time.perf_counter() - began
            waits = np.array([wait for _, wait, _ in answers])
            turn.over(
                value_s=seconds,
                client_cpu_s=time.process_time() - cpu,
                answered=sum(tokens > 0 for _, _, tokens in answers),
                different=len({request_id for request_id, _, _ in answers}),
                tokens=sum(tokens for _, _, tokens in answers),
                failed=sum(client.failed for client in clients),
                refused=sum(client.refused for client in clients),
                wait_p50_s=float(np.quantile(waits, 0.5)),
                wait_p99_s=float(np.quantile(waits, 0.99)),
            )
    finally:
        for client in clients:
            await client.http.close()


def main() -> None:
    url, key, model, count, requests = sys.argv[1:]
    try:
        asyncio.run(work(url, key, model, int(count), int(requests)))
    except KeyboardInterrupt:  # the benchmark is over
        return


if __name__ == "__main__":
    main()
