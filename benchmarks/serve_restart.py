"""Seconds until 1,000 open promises of `rlsys serve` are answered after a kill -9.

    python -m benchmarks.serve_restart [http] [controller] [service] [--promises 1000]

A client has submitted 1,000 sample requests and polls for all of them, as SDKs do: it repeats a poll after a lost
connection, 408 and 5xx, and takes any other answer as the last. Killed are the HTTP process (all promises give their
results), the controller (410: sample requests are submitted again by SDKs), and the service with all its own processes,
which is then started again on the same port (410). Beside each, the same without a kill.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import time
from collections import Counter
from typing import Any

import httpx

from benchmarks import serve_calls as calls
from benchmarks.rows import Row, finish
from benchmarks.serve_setup import KEY, MODEL, Served, served, start_server, wait_for_address

HEADERS = {"X-API-Key": KEY}
LIMIT_S = 300.0
CONNECTIONS = 100
TOKENS = 64


class Client:
    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CONNECTIONS)
        self._http = httpx.AsyncClient(base_url=f"{url}/api/v1/", headers=HEADERS, limits=limits, timeout=60)
        self.repeated = 0

    async def ask(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Repeated as an SDK does it."""
        began = time.monotonic()
        while True:
            try:
                found = await self._http.post(path, json=body)
                if found.status_code < 500 and found.status_code not in (408, 429):
                    return found
            except httpx.TransportError:
                await asyncio.sleep(0.2)
            if time.monotonic() - began > LIMIT_S:
                raise SystemExit(f"{path}: no answer within {LIMIT_S} s")
            self.repeated += 1
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        await self._http.aclose()


async def answered(server: Served, promises: int, kind: str) -> tuple[float, Counter[str], int]:
    """Seconds from the kill (or from the last submission) to the last answer; the answers; repeated requests."""
    client = Client(server.url)
    session = (await client.ask("create_session", {"tags": [], "sdk_version": "0.38.0"})).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = (await client.ask("create_sampling_session", body)).json()["sampling_session_id"]
    prompts = calls.many_prompts(promises)

    async def submit(i: int) -> str:
        asked = {"sampling_session_id": sampler, "seq_id": i, "prompt": {"chunks": [{"tokens": prompts[i]}]}}
        asked["sampling_params"] = {"max_tokens": TOKENS, "temperature": 1.0}
        return str((await client.ask("asample", asked)).json()["request_id"])

    ids = await asyncio.gather(*(submit(i) for i in range(promises)))
    polls = [asyncio.create_task(client.ask("retrieve_future", {"request_id": each})) for each in ids]
    await asyncio.sleep(0.5)  # until they are held
    began = time.monotonic()
    await asyncio.to_thread(kill, server, kind)
    found = await asyncio.gather(*polls)
    seconds = time.monotonic() - began
    await client.close()
    return seconds, Counter(kind_of(each) for each in found), client.repeated


def kind_of(answer: httpx.Response) -> str:
    failed = answer.status_code == 200 and b'"error"' in answer.content[:20]
    return "failed" if failed else str(answer.status_code)


def kill(server: Served, kind: str) -> None:
    if kind == "nothing":
        return
    processes = server.processes()
    if kind == "service":
        for process in processes.values():
            process.kill()
        port = int(server.url.rpartition(":")[2])
        log = server.folder / "serve-again.log"
        process_again: subprocess.Popen[bytes] = start_server(server.folder / "serve.json", log, f"bind.port={port}")
        wait_for_address(process_again, log)
        server.again.append(process_again)
    else:
        processes["HTTP process" if kind == "http" else kind].kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="http, controller, service; default: all")
    parser.add_argument("--promises", type=int, default=1000)
    given = parser.parse_args()
    for kind in given.kinds or ["http", "controller", "service"]:
        with served("bfloat16") as server:
            asyncio.run(answered(server, 100, "nothing"))  # the first requests are slow
            undisturbed, plain, _ = asyncio.run(answered(server, given.promises, "nothing"))
            killed, answers, repeated = asyncio.run(answered(server, given.promises, kind))
            if plain["200"] != given.promises or answers.total() != given.promises:
                raise SystemExit(f"found {plain} and {answers}; wanted {given.promises} answers each")
            finish(
                Row(
                    name=f"serve_restart_{kind}",
                    title=f"`rlsys serve`: {given.promises:,} open promises answered after kill -9 of the {kind}",
                    command=f"serve_restart {kind} --promises {given.promises}",
                    unit="s",
                    sides={"killed": [killed], "not killed": [undisturbed]},
                    equal=server.about | {"tokens": TOKENS},
                    more={"answers": dict(answers), "repeated requests": repeated},
                )
            )


if __name__ == "__main__":
    main()
