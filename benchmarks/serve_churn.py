"""A day of `rlsys serve` in minutes: sessions that are opened and left, models that are made and dropped, checkpoints
that expire. Memory of the server's processes and its disk stay flat.

    python -m benchmarks.serve_churn [--sessions 10000] [--models 1000]

Times are scaled: a session ends after 2 s without a request and is forgotten 4 s later, a checkpoint lives 1 s. Every
tenth session has a model, which is trained for a step, saved, and left. Figures are taken at ten points of time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import serve_calls as calls
from benchmarks.rows import Row, Target, finish
from benchmarks.serve_setup import KEY, MODEL, Served, served

POINTS = 10
LIMITS = {"session_s": 2.0, "ended_session_s": 4.0, "result_s": 2.0, "undelivered_s": 4.0, "sessions": 100_000}
SETTLE_S = 45.0  # sweeps of sessions, results and expired checkpoints
HEADERS = {"X-API-Key": KEY, "Content-Type": "application/json"}


class Client:
    """One connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=calls.LIMIT_S)

    def ask(self, path: str, body: dict[str, Any], method: str = "POST") -> Any:
        self._connection.request(method, f"/api/v1/{path}", json.dumps(body).encode(), HEADERS)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != http.client.OK:
            raise SystemExit(f"{path}: {answer.status} {content[:300]!r}")
        return json.loads(content)

    def result(self, promise: dict[str, Any]) -> Any:
        found = self.ask("retrieve_future", {"request_id": promise["request_id"]})
        if "error" in found:
            raise SystemExit(f"a promise failed: {found}")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=1_000)
    given = parser.parse_args()
    with served("bfloat16", **LIMITS) as server:
        client = Client(server.url)
        points, every = [], given.sessions // POINTS
        began = time.monotonic()
        for i in range(given.sessions):
            session = client.ask("create_session", {"tags": [], "sdk_version": "0.38.0"})["session_id"]
            if i % max(1, given.sessions // given.models) == 0:
                train(client, session)
            if (i + 1) % every == 0:
                points.append(figures(server))
                print(i + 1, round(time.monotonic() - began), points[-1], flush=True)
        churned = time.monotonic() - began
        time.sleep(SETTLE_S)
        points.append(figures(server))
    finish(row(given, points, churned, server))


def train(client: Client, session: str) -> None:
    """A model, one step of it, and a checkpoint that expires; the client leaves without a word."""
    body = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 4, "seed": 1}}
    model = client.result(client.ask("create_model", body))["model_id"]
    tokens = list(range(1, 17))
    inputs = {"target_tokens": {"data": tokens, "dtype": "int64", "shape": [16]}}
    inputs["weights"] = {"data": [1.0] * 16, "dtype": "float32", "shape": [16]}
    datum = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]}, "loss_fn_inputs": inputs}
    call = {"model_id": model, "seq_id": 1, "forward_backward_input": {"data": [datum], "loss_fn": "cross_entropy"}}
    client.ask("forward_backward", call)
    client.ask("optim_step", {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 1e-3}})
    client.result(client.ask("save_weights", {"model_id": model, "seq_id": 3, "path": "a", "ttl_seconds": 1}))


def figures(server: Served) -> dict[str, float]:
    memory = {f"{name} MiB": round(mib, 1) for name, mib in server.memory_mib().items()}
    return memory | {"disk MiB": round(disk_mib(server.folder / "checkpoints"), 2)}


def disk_mib(folder: Path) -> float:
    sizes = []
    for file in folder.rglob("*"):
        try:
            sizes.append(file.stat().st_blocks * 512)
        except FileNotFoundError:  # it has just expired
            continue
    return sum(sizes) / 2**20


def row(given: argparse.Namespace, points: list[dict[str, float]], churned: float, server: Served) -> Row:
    half = len(points) // 2
    total = [sum(mib for name, mib in each.items() if name != "disk MiB") for each in points]
    return Row(
        name="serve_churn",
        title=f"`rlsys serve`: memory after {given.sessions:,} sessions and {given.models:,} models",
        command=f"serve_churn --sessions {given.sessions} --models {given.models}",
        unit="MiB",
        sides={"at the end": [total[-1]], "half way": [total[half]]},
        targets=[Target("at the end", "half way", 1.1, "<=")],
        equal=server.about | {"limits": LIMITS},
        more={"figures": points, "seconds": round(churned, 1)},
    )


if __name__ == "__main__":
    main()
