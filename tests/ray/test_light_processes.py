"""Processes of a real job: only those that hold weights load torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from rlsys.config import JobConfig, dump_config
from tests.waiting import cpu_of, size_of, until

HOLD_WEIGHTS = {"ray::LearnerActor"}
LIGHT = {"driver", "ray::RewardActor", "ray::GroupAdvantageActor"}


def test_driver_reward_actor_and_advantage_actor_of_a_job_load_no_torch(
    ray_cluster: str, job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(dump_config(job("rl.steps=1")))
    command = [sys.executable, "-m", "rlsys", "train", str(tmp_path / "job.yaml")]
    output, seen, with_torch = tmp_path / "output", set[str](), set[str]()

    def look() -> bool:
        for role, process in _roles(driver):
            seen.add(role)
            if _maps_torch(process):
                with_torch.add(role)
        return driver.poll() is not None

    with output.open("w") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        signs = size_of(output), cpu_of(driver.pid)
        until(look, "the end of the job", *signs, state=output.read_text, poll_s=0.2)
    finally:
        driver.kill()
    assert driver.returncode == 0, output.read_text()
    assert seen >= HOLD_WEIGHTS | LIGHT
    assert with_torch == HOLD_WEIGHTS


def _roles(driver: subprocess.Popen[bytes]) -> list[tuple[str, psutil.Process]]:
    """Processes of the job by role; its actors belong to the cluster, which this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = process.cmdline()[0]
        except (psutil.Error, IndexError):
            continue  # it has just ended
        role = "driver" if process.pid == driver.pid else title
        if role in HOLD_WEIGHTS | LIGHT:
            found.append((role, process))
    return found


def _maps_torch(process: psutil.Process) -> bool:
    try:
        return "/libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:  # it has just ended
        return False
