"""One deployment that two sides use: this process through `rlsys.ServiceClient`, clients through `rlsys serve`.

The server joins the Ray cluster and the deployment that this process started, so learner and sampler are the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray

import rlsys
from benchmarks.grpo_step import CASES, folder_of_model
from benchmarks.sides import Side
from rlsys.config import ClusterSection, LearnerSection, SamplerSection

ROOT = Path(__file__).parents[1]
CLIENT = ROOT / ".clients/tinker-0.38.0/bin/python"
MODEL = "tiny"
KEY = "tml-any"
START_S, STOP_S = 120.0, 60.0
MAX_LENGTH = 1024
TOKEN_BUDGET, MAX_NUM_SEQS = 4096, 256
RESULT_S = 5.0


@dataclass(frozen=True, slots=True)
class Served:
    """A deployment, and the server in front of it."""

    service: rlsys.ServiceClient
    url: str
    pid: int
    folder: Path
    dtype: str
    again: list[subprocess.Popen[bytes]] = field(default_factory=list)  # servers that took its place

    @property
    def about(self) -> dict[str, Any]:
        """What all sides have in common, for a row's file."""
        return {
            "model": CASES["tiny"].shape,
            "dtype": self.dtype,
            "deployment": "one learner and one sampler, which all sides use in turn",
            "client": "tinker 0.38.0",
            "sampler.max_num_seqs": MAX_NUM_SEQS,
            "learner.token_budget": TOKEN_BUDGET,
        }

    @property
    def environment(self) -> dict[str, str]:
        """Of a client's process."""
        nowhere = "http://127.0.0.1:9"
        return {
            "PYTHONPATH": str(ROOT),
            "TINKER_BASE_URL": self.url,
            "TINKER_API_KEY": KEY,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HTTP_PROXY": nowhere,
            "HTTPS_PROXY": nowhere,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def sdk(self, what: str) -> Side:
        """A process of the official SDK, ready for its first turn."""
        log = self.folder / f"sdk-{what}.log"
        side = Side(f"SDK ({what})", [str(CLIENT), "-m", "benchmarks.serve_sdk", what, MODEL], log, self.environment)
        side.ready()
        return side

    @staticmethod
    def turn(side: Side) -> float:
        """Seconds of a turn's call, as the side measured them."""
        side.step()
        return float(side.turns[-1]["value_s"])

    def processes(self) -> dict[str, psutil.Process]:
        """The server's own: the command, its HTTP process, and the controller's actor."""
        found = {"command": psutil.Process(self.pid)}
        for process in psutil.Process().children(recursive=True):
            title = " ".join(process.cmdline())
            if "actors.front.http_process" in title:
                found["HTTP process"] = process
            elif title.startswith("ray::ControllerActor"):
                found["controller"] = process
        return found

    def memory_mib(self) -> dict[str, float]:
        """Unique set size of each."""
        return {name: process.memory_full_info().uss / 2**20 for name, process in self.processes().items()}


@contextmanager
def served(dtype: str, **limits: float) -> Iterator[Served]:
    """Start the deployment and the server. Both end with the block."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="serve-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        case = CASES["tiny" if dtype == "bfloat16" else "tiny-fp32"]
        model = folder_of_model(case, folder / "model")
        shared: dict[str, Any] = {
            "learner": LearnerSection(num_cpus=0.5, token_budget=TOKEN_BUDGET),
            "sampler": SamplerSection(num_cpus=0.5, kv_cache_gb=0.5, max_num_seqs=MAX_NUM_SEQS, max_live_adapters=6),
            "dtype": dtype,
            "max_length": MAX_LENGTH,
            "checkpoints": str(folder / "checkpoints"),
        }
        config = rlsys.ServiceConfig(
            models={MODEL: str(model)}, cluster=ClusterSection(num_cpus=2, object_store_gb=0.5), **shared
        )
        service = stack.enter_context(rlsys.ServiceClient(config))
        service.create_sampling_client(base_model=MODEL)  # starts the deployment
        address = ray.get_runtime_context().gcs_address
        yield stack.enter_context(_server(service, folder, address, dtype, limits))


@contextmanager
def _server(
    service: rlsys.ServiceClient, folder: Path, address: str, dtype: str, limits: Mapping[str, float]
) -> Iterator[Served]:
    config = {
        "models": {MODEL: str(folder / "model")},
        "bind": {"port": 0},
        "keys": None,
        "checkpoints": str(folder / "checkpoints"),
        "limits": {"result_s": RESULT_S, **limits},
        "deployment": {"cluster": {"address": address}, "max_length": MAX_LENGTH},
    }
    file, log = folder / "serve.json", folder / "serve.log"
    file.write_text(json.dumps(config))
    process = start_server(file, log)
    found = Served(service, wait_for_address(process, log), process.pid, folder, dtype)
    try:
        yield found
        if process.poll() is not None and not found.again:
            raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    finally:
        for each in [process, *found.again]:
            each.send_signal(signal.SIGTERM)
            try:
                each.wait(STOP_S)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()


def start_server(file: Path, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "rlsys", "serve", str(file), *overrides]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=file.parent)


def wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    limit = time.monotonic() + START_S
    while time.monotonic() < limit:
        found = re.search(r"TINKER_BASE_URL=(\S+)", log.read_text(errors="replace"))
        if found:
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
