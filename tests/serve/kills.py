"""Kill -9 of a server's processes while clients run, and what the clients saw."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests import waiting
from tests.serve.clients import SDKS, Server, environment, python

TITLES = {
    "http": "actors.front.http_process",
    "controller": "ray::ControllerActor",
    "learner": "ray::ServiceLearner",
    "sampler": "ray::ServiceSampler",
    "host": "rlsys host of sampler",
    "engine": "EngineCore",
}


@dataclass
class Loop:
    """One client program that runs."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        found = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in found if line.startswith("{") and line.endswith("}")]

    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line.get("saw") == "a step"]


def begin(server: Server, name: str, steps: int, folder: Path) -> Loop:
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        command = [python(SDKS[-1]), "-m", "tests.serve.programs.grpo_loop", name, str(steps)]
        return Loop(name, subprocess.Popen(command, stdout=out, stderr=out, env=environment(server), cwd=folder), log)


def finished(server: Server, loops: Sequence[Loop]) -> list[list[dict[str, Any]]]:
    """The steps of each loop, once all have ended."""
    for loop in loops:
        sizes = [waiting.size_of(each.log) for each in loops]
        waiting.until(
            partial(has_ended, server, loop),
            f"the loop {loop.name} to end",
            waiting.cpu_of(server.pid),
            *sizes,
            state=loop.log.read_text,
        )
        refuse_end(server)
        code = loop.process.wait()
        assert code == 0, f"{loop.name}: {loop.log.read_text()[-3000:]}\n{server.log.read_text()[-3000:]}"
    return [loop.steps() for loop in loops]


def victims(server: Server, kind: str) -> list[psutil.Process]:
    found = []
    for process in waiting.family(server.pid):
        try:
            if TITLES[kind] in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def has_ended(server: Server, loop: Loop) -> bool:
    """Whether one of the two has."""
    return loop.process.poll() is not None or not waiting.is_alive(server.pid)


def refuse_end(server: Server) -> None:
    """Clients go on asking for a server that has ended, and write so: they would be waited for without an end."""
    assert waiting.is_alive(server.pid), f"the server has ended: {server.log.read_text()[-3000:]}"


def kill(server: Server, kind: str) -> int:
    """Kill one process of this kind, as soon as there is one. Returns its process id."""
    found = waiting.until(
        lambda: victims(server, kind),
        f"a process of kind {kind}",
        waiting.cpu_of(server.pid),
        state=server.log.read_text,
    )
    assert found
    found[0].kill()
    return found[0].pid


def after_a_step(server: Server, loop: Loop, seconds: float = 0.0) -> None:
    """Wait until a loop has made a step, and then this long."""
    before = len(loop.steps())
    signs = (waiting.size_of(loop.log), waiting.cpu_of(server.pid))
    waiting.until(
        lambda: len(loop.steps()) > before or has_ended(server, loop),
        f"a step of {loop.name}",
        *signs,
        state=loop.log.read_text,
    )
    refuse_end(server)
    time.sleep(seconds)
