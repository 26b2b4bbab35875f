"""`rlsys train` with the docs' reward function, which starts Ray itself. While it runs, its processes are looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rlsys.config import JobConfig, dump_config, parse_config
from rlsys.run_state.jsonl import read_metrics
from tests.ray.conftest import JOB
from tests.waiting import cpu_of, size_of, until

ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(r"```python\n# my_rewards\.py\n(.*?)```", re.DOTALL)
HOLD_WEIGHTS = {"ray::LearnerActor"}
LIGHT = {"driver", "ray::RewardActor", "ray::GroupAdvantageActor"}


@dataclass(frozen=True)
class Ended:
    config: JobConfig
    said: str
    seen: set[str]  # roles of its processes
    with_torch: set[str]


@pytest.fixture(scope="module")
def ended(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("command")
    found = EXAMPLE.search((ROOT / "docs" / "extending.md").read_text("utf-8"))
    assert found is not None
    (folder / "my_rewards.py").write_text(found[1], "utf-8")
    where = [f"model.path={micro_base}", f"run.dir={folder}", "run.name=brief"]
    config = parse_config(JOB, [*where, "rewards.function=null", "rl.steps=1", "eval.samples=2"])
    (folder / "job.yaml").write_text(dump_config(config), "utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), "."])
    command = [sys.executable, "-m", "rlsys", "train", "job.yaml", "rewards.function=my_rewards:brief"]
    output, seen, with_torch = folder / "output", set[str](), set[str]()

    def look() -> bool:
        for role, process in _roles(driver.pid):
            seen.add(role)
            if _maps_torch(process):
                with_torch.add(role)
        return driver.poll() is not None

    with output.open("w") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=environment)
    try:
        until(look, "the end of the job", size_of(output), cpu_of(driver.pid), state=output.read_text, poll_s=0.2)
    finally:
        driver.kill()
    assert driver.returncode == 0, output.read_text()
    return Ended(config, output.read_text(), seen, with_torch)


def test_the_reward_function_of_the_docs_runs_as_the_docs_say(ended: Ended) -> None:
    lines = read_metrics(ended.config.run_dir)
    evaluated = [line for line in lines if "eval/accuracy" in line]
    assert [line["step"] for line in evaluated] == [0, 1]
    for line in evaluated:
        assert -0.2 < line["eval/accuracy"] < 0, "a random model is wrong, and pays for each character"
        assert line["eval/accuracy_low"] <= line["eval/accuracy"] <= line["eval/accuracy_high"]
        assert line["eval/solved"] == line["eval/pass_at_1"] == 0
    assert "held-out reward" in ended.said
    assert "Held-out reward" in (ended.config.run_dir / "report.html").read_text("utf-8")


def test_driver_reward_actor_and_advantage_actor_of_a_job_load_no_torch(ended: Ended) -> None:
    assert ended.seen >= HOLD_WEIGHTS | LIGHT
    assert ended.with_torch == HOLD_WEIGHTS


def _roles(driver: int) -> Iterator[tuple[str, psutil.Process]]:
    """The driver and the actors below it, by role."""
    yield "driver", psutil.Process(driver)
    for process in psutil.Process(driver).children(recursive=True):
        try:
            title = process.cmdline()[0]
        except (psutil.Error, IndexError):
            continue  # it has just ended
        if title in HOLD_WEIGHTS | LIGHT:
            yield title, process


def _maps_torch(process: psutil.Process) -> bool:
    try:
        return "/libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:  # it has just ended
        return False
