"""A client loses nothing but time when processes of its server are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve import kills
from tests.serve.clients import Server

STEPS = 4


def test_a_loop_makes_the_same_steps_when_the_http_process_and_the_controller_are_killed(
    server: Server, tmp_path: Path
) -> None:
    (undisturbed,) = kills.finished(server, [kills.begin(server, "same", STEPS, tmp_path)])
    loop = kills.begin(server, "same", STEPS, tmp_path)
    for kind in ("http", "controller"):
        kills.after_a_step(server, loop, 0.2)
        kills.kill(server, kind)
    (steps,) = kills.finished(server, [loop])
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for found, wanted in zip(steps, undisturbed, strict=True):
        assert found["reward"] == wanted["reward"]
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    lost = [line for line in loop.lines() if line.get("saw") == "a loss"]
    assert len(lost) <= 1, f"the HTTP process alone costs nothing: {lost}"
