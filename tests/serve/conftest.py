"""One server for all tests here, started by its command and stopped by a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import waiting
from tests.serve import tiny_base
from tests.serve.clients import ROOT, Server

ALIAS = "Qwen/Qwen3-8B-Base"
KEY, SK_KEY = "tml-alice-0123456789", "sk-bob-0123456789"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    if found := os.environ.get("RLSYS_SERVE_MODEL"):  # of a server that runs already
        return found
    # A name with exactly two slashes loses its last part in the SDK.
    folder = tmp_path_factory.mktemp("tiny") / "models" / "base"
    tiny_base.make(folder)
    return str(folder)


@pytest.fixture(scope="package")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if url := os.environ.get("RLSYS_SERVE_URL"):  # one that runs already: RLSYS_SERVE_MODEL, _PID and _LOG say which
        model, pid, file = (os.environ[f"RLSYS_SERVE_{each}"] for each in ("MODEL", "PID", "LOG"))
        yield Server(url, KEY, SK_KEY, model, ALIAS, int(pid), Path(file))
        return
    base: str = request.getfixturevalue("base")
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    process = start(configure(folder, base), log)
    try:
        found: str | None = waiting.until(
            lambda: address(log), f"the server's address in {log}", process=process, state=log.read_text
        )
        assert found is not None
        yield Server(found, KEY, SK_KEY, base, ALIAS, process.pid, log)
        process.send_signal(signal.SIGTERM)
        assert waiting.exit_code(process, "the server") == 0, log.read_text()[-3000:]
        assert "Traceback" not in log.read_text() and log.read_text().rstrip().endswith("stopped"), log.read_text()
    finally:
        members = waiting.family(process.pid) if process.poll() is None else []
        for each in members:
            each.kill()


def configure(folder: Path, base: str, cluster: dict[str, Any] | None = None) -> Path:
    """`cluster` None: the server starts Ray."""
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{KEY} alice\n{SK_KEY} bob\n")
    file = folder / "serve.yaml"
    learner = {"num_cpus": 0.5, "token_budget": 4096}
    sampler = {
        "num_cpus": 0.5,
        "kv_cache_gb": 0.2,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "max_lora_rank": 32,
        "max_live_adapters": 6,
    }
    settings = {
        "models": {base: {"path": base, "aliases": [ALIAS]}},
        "bind": {"port": 0},
        "keys": str(keys),
        "checkpoints": str(folder / "checkpoints"),
        "limits": {"models": 256},  # clients before 0.28 do not say when they end
        "deployment": {
            "cluster": cluster or {"num_cpus": 2, "object_store_gb": 0.3, "max_restarts": 1000},
            "learner": learner,
            "sampler": sampler,
            "room_timeout_s": 600,
        },
    }
    file.write_text(yaml.safe_dump(settings))
    return file


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    """The server's command. It starts Ray for itself, whatever cluster the other tests share."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment = {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RAY_AUTH_MODE": "disabled"}
    with log.open("wb") as file:
        command = [sys.executable, "-m", "rlsys", "serve", str(config)]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=config.parent)


def address(log: Path) -> str | None:
    """What the server prints for clients."""
    found = re.search(r"TINKER_BASE_URL=(\S+)", log.read_text(errors="replace"))
    return found[1] if found else None
