"""2,000 sample requests at once from 20 clients of `rlsys serve` against the same requests to the deployment itself.

The clients share one process (`benchmarks/serve_clients.py`); each has its session and its connections, and each
request one completion of 32 tokens. Meanwhile this process asks for healthz on a new connection every 50 ms. A run ends
with an error if a request was lost, failed or answered with fewer tokens. The server keeps a result for 5 s here, so
that a round does not hold the results of the one before it: memory is read after that time.
"""

from __future__ import annotations

import http.client
import sys
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import numpy as np

from benchmarks import serve_calls as calls
from benchmarks.rows import Row, Target, by_turns, spread
from benchmarks.serve_setup import KEY, MODEL, RESULT_S, Served
from benchmarks.sides import Side
from rlsys import types

HTTP, DIRECT = "HTTP", "deployment"
REQUESTS, CLIENTS = 2000, 20
HEALTH_EVERY_S, HEALTH_P99_S = 0.05, 2.0
SWEEP_S = 2.0  # how often the server forgets results, and a margin


def load(server: Served, repeats: int) -> list[Row]:
    sampler = server.service.create_sampling_client(base_model=MODEL)
    prompts = [types.ModelInput.from_ints(prompt) for prompt in calls.many_prompts(REQUESTS)]
    params = types.SamplingParams(max_tokens=calls.MAX_TOKENS, temperature=1.0)
    log = server.folder / "clients.log"
    command = ["-m", "benchmarks.serve_clients", server.url, KEY, MODEL, str(CLIENTS), str(REQUESTS)]
    clients = Side("clients", [sys.executable, *command], log, server.environment)
    clients.ready()
    memory, healthz, server_cpu_s = [server.memory_mib()], list[list[float]](), list[float]()

    def ask(some: Sequence[types.ModelInput]) -> int:
        answers = [sampler.sample(prompt, 1, params) for prompt in some]
        return sum(len(answer.result(calls.LIMIT_S).sequences[0].tokens) for answer in answers)

    def direct() -> float:
        began = time.perf_counter()
        tokens = ask(prompts)
        taken = time.perf_counter() - began
        refuse_losses(tokens)
        return REQUESTS / taken

    def through_http() -> float:
        before = cpu_s(server)
        with Health(server) as health:
            taken = server.turn(clients)
        server_cpu_s.append(cpu_s(server) - before)
        healthz.append(health.seconds)
        said = clients.turns[-1]
        refuse_losses(said["tokens"])
        if not said["answered"] == said["different"] == REQUESTS or said["failed"]:
            raise SystemExit(f"found {said}; wanted {REQUESTS} different answers\n{log.read_text()[-2000:]}")
        time.sleep(RESULT_S + SWEEP_S)
        memory.append(server.memory_mib())
        return REQUESTS / taken

    ask(prompts[: calls.FIRST_REQUESTS])  # the clients began with as many
    found = by_turns({DIRECT: direct, HTTP: through_http}, repeats, warmups=0)
    clients.close()
    turns = clients.turns
    p99 = [float(np.quantile(seconds, 0.99)) for seconds in healthz]
    equal = server.about | {
        "requests": REQUESTS,
        "clients": CLIENTS,
        "tokens": calls.MAX_TOKENS,
        "limits.result_s": RESULT_S,
    }
    more = {
        "wait_p50_s": spread([turn["wait_p50_s"] for turn in turns]),
        "wait_p99_s": spread([turn["wait_p99_s"] for turn in turns]),
        "answered 429 and asked again": turns[-1]["refused"],
        "server_cpu_s": spread(server_cpu_s),
        "clients_cpu_s": spread([turn["client_cpu_s"] for turn in turns]),
        "server's USS in MiB at first and after each round": [
            {name: round(mib, 1) for name, mib in each.items()} for each in memory
        ],
    }
    title = f"`rlsys serve`: {REQUESTS:,} sample requests at once from {CLIENTS} clients"
    throughput = Row(
        name="serve_load",
        title=title,
        command="serve load",
        unit="requests/s",
        sides=found,
        targets=[Target(HTTP, DIRECT, 0.9, ">=")],
        equal=equal,
        more=more,
    )
    health = Row(
        name="serve_load_healthz",
        title="`rlsys serve`: healthz under that load, 99th percentile",
        command="serve load",
        unit="s",
        sides={"healthz": p99, "limit": [HEALTH_P99_S] * repeats},
        targets=[Target("healthz", "limit", 1.0, "<=")],
        equal=equal,
    )
    return [throughput, health]


def cpu_s(server: Served) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in server.processes().values())


def refuse_losses(tokens: int) -> None:
    if tokens != REQUESTS * calls.MAX_TOKENS:
        raise SystemExit(f"found {tokens} tokens; wanted {REQUESTS} x {calls.MAX_TOKENS}")


class Health:
    """Asks for healthz in a thread, and keeps the seconds of each answer."""

    def __init__(self, server: Served) -> None:
        self.seconds: list[float] = []
        self._where = urlsplit(server.url).netloc
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(HEALTH_EVERY_S):
            began = time.perf_counter()
            connection = http.client.HTTPConnection(self._where, timeout=calls.LIMIT_S)
            connection.request("GET", "/api/v1/healthz")
            connection.getresponse().read()
            connection.close()
            self.seconds.append(time.perf_counter() - began)
