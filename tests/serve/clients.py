"""Programs of a client's environment, run against a server as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import waiting

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".clients"
VERSIONS = ("0.6.0", "0.15.0", "0.22.0", "0.24.1", "0.25.0", "0.28.1", "0.33.0", "0.36.0", "0.38.0")
SDKS = tuple(f"tinker-{each}" for each in VERSIONS)
# The first and the last, and the two after which the protocol changed most; `make soak` runs all.
USUAL = ("tinker-0.6.0", "tinker-0.22.0", "tinker-0.24.1", "tinker-0.38.0")
EACH_SDK = [pytest.param(each, marks=[] if each in USUAL else pytest.mark.soak) for each in SDKS]
# For a program whose calls another program makes with each of the usual ones.
ENDS = [pytest.param(each, marks=[] if each in (SDKS[0], SDKS[-1]) else pytest.mark.soak) for each in SDKS]
MINT, COOKBOOK = "mint-0.2.0", "cookbook-0.6.1"
NOWHERE = "http://127.0.0.1:9"  # a proxy that is not there: nothing of a client reaches another host


@dataclass(frozen=True)
class Server:
    """A running server: two tenants, and one model under a folder's name and under names that the cookbook knows."""

    url: str
    key: str  # of one tenant
    sk_key: str  # of another, in MinT's form
    model: str  # an absolute folder, whose tokenizer clients can load
    alias: str  # a name that tinker-cookbook knows
    pid: int
    log: Path


def python(client: str) -> str:
    """The interpreter of a client's environment; skips the test by name without it."""
    if not (CLIENTS / client / ".ready").exists():
        pytest.skip(f"needs the environment .clients/{client}, which `make clients` creates")
    return str(CLIENTS / client / "bin" / "python")


def environment(server: Server, **more: str) -> dict[str, str]:
    # Ray's and pytest's variables are no user's
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST", "TINKER_", "MINT_"))
    }
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": server.key,
        "RLSYS_SERVE_MODEL": server.model,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HTTPS_PROXY": NOWHERE,
        "HTTP_PROXY": NOWHERE,
        "NO_PROXY": "127.0.0.1,localhost",
        **more,
    }


def run(
    server: Server, client: str, arguments: Sequence[str], folder: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    command = [python(client), *arguments]
    signs = [waiting.cpu_of(server.pid), waiting.size_of(server.log)]
    return waiting.run(command, cwd=folder, env=environment(server, **more), signs=signs)


def seen(server: Server, client: str, program: str, folder: Path, *arguments: str, **more: str) -> list[dict[str, Any]]:
    """Lines of a program of tests/serve/programs; fails with all that it found wrong."""
    done = run(server, client, ["-m", f"tests.serve.programs.{program}", *arguments], folder, **more)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = [each for each in lines if "error" in each or each.get("holds") is False]
    told = "\n".join(f"{each.get('check') or each.get('step')}: {json.dumps(each, indent=1)}" for each in wrong)
    assert not wrong and done.returncode == 0, f"{client} {program}: {told}\n{done.stderr[-4000:]}"
    assert lines and lines[-1].get("saw") == "end", f"{client} {program} did not come to its end\n{done.stderr[-4000:]}"
    return lines
