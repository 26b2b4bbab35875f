"""Random kill -9s of a server's processes under clients that run GRPO loops.

Every step is made once, with the losses of an undisturbed run, and nothing is left behind.

The table of what was killed is written to serve_kills.json in the folder that RLSYS_SOAK_OUT names, and printed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.serve import kills
from tests.serve.clients import Server
from tests.serve.conftest import base, server

__all__ = ["base", "server"]  # fixtures

KILLS = int(os.environ.get("RLSYS_SOAK_SERVE_KILLS", "50"))
LOOPS = 4
STEPS = int(os.environ.get("RLSYS_SOAK_SERVE_STEPS", "240"))
BETWEEN_S = (0.0, 3.0)
MIB = 2**20


@pytest.mark.soak
@pytest.mark.timeout(36000)
def test_random_kills_lose_no_step_and_repeat_none(server: Server, tmp_path: Path) -> None:
    draw = random.Random(18)
    names = [f"loop{i}" for i in range(LOOPS)]
    undisturbed = kills.finished(server, [kills.begin(server, name, STEPS, tmp_path) for name in names])
    before = memory(server)
    # A server gives up after six ends of its HTTP process within a minute, so each kind has its turn in each round.
    rounds = [draw.sample(list(kills.TITLES), len(kills.TITLES)) for _ in range(-(-KILLS // len(kills.TITLES)))]
    wanted = list(itertools.chain(*rounds))[:KILLS]
    folder = tmp_path / "killed"
    folder.mkdir()
    loops = [kills.begin(server, name, STEPS, folder) for name in names]
    rows: list[dict[str, object]] = []
    for kind in wanted:
        running = [each for each in loops if each.process.poll() is None]
        assert running, f"the loops ended after {len(rows)} kills: make more steps (RLSYS_SOAK_SERVE_STEPS)"
        began = time.monotonic()
        pid = kills.kill(server, kind)
        kills.after_a_step(server, draw.choice(running))
        rows.append({"kind": kind, "pid": pid, "until a step s": round(time.monotonic() - began, 1)})
        time.sleep(draw.uniform(*BETWEEN_S))
    found = kills.finished(server, loops)
    apart = 0.0
    for name, steps, wanted_steps in zip(names, found, undisturbed, strict=True):
        assert [each["step"] for each in steps] == list(range(1, STEPS + 1)), name
        for one, other in zip(steps, wanted_steps, strict=True):
            norms = abs(one["grad_norm"] - other["grad_norm"]) / max(1.0, other["grad_norm"])
            apart = max(apart, norms, abs(one["reward"] - other["reward"]))
    after = memory(server)
    out = Path(os.environ.get("RLSYS_SOAK_OUT", str(tmp_path)))
    told = {"kills": rows, "greatest difference": apart, "MiB before": before, "MiB after": after}
    (out / "serve_kills.json").write_text(json.dumps(told, indent=1))
    print(json.dumps(told, indent=1))
    assert len(rows) == KILLS and apart < 1e-3
    assert total(after) < 1.15 * total(before) + 50


def memory(server: Server) -> dict[str, float]:
    """Unique set size of each kind of process."""
    return {kind: round(sum(sizes(server, kind)), 1) for kind in kills.TITLES}


def sizes(server: Server, kind: str) -> Iterator[float]:
    for process in kills.victims(server, kind):
        try:
            yield process.memory_full_info().uss / MIB
        except psutil.Error:
            continue


def total(memory: dict[str, float]) -> float:
    return sum(memory.values())
