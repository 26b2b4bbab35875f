"""Random kill -9s over short runs: nothing is lost, nothing is done twice, and the end is that of an undisturbed run.

The table of what was killed, and how long it took until the next step was made, is written to kills.json in the folder
that RLSYS_SOAK_OUT names, and printed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlsys.config import JobConfig, dump_config, parse_config
from rlsys.learner.adapter_checkpoint import read_adapter
from rlsys.run_state.jsonl import read_metrics
from tests.ray.conftest import JOB, micro_base, ray_cluster, warm_cluster
from tests.ray.test_recovery import actors_of, engines, hosts, ledger_of, steps, weights
from tests.waiting import Sign, cpu_of, exit_code, size_of, until

__all__ = ["micro_base", "ray_cluster", "warm_cluster"]  # fixtures

KILLS = int(os.environ.get("RLSYS_SOAK_KILLS", "50"))
PER_RUN = 10
STEPS = 60
KINDS: dict[str, Callable[[], list[psutil.Process]]] = {
    "learner": lambda: actors_of("LearnerActor"),
    "sampler": lambda: actors_of("SamplerActor"),
    "host": hosts,
    "engine": engines,
    "grader": lambda: _graders(),
}


def _graders() -> list[psutil.Process]:
    """Processes of the pool that grade, not its fork server."""
    found = [child for actor in actors_of("RewardActor") for child in actor.children(recursive=True)]
    return [child for child in found if not child.children() and "forkserver" in " ".join(child.cmdline())]


@pytest.mark.soak
@pytest.mark.timeout(36000)
def test_random_kills_lose_nothing_and_change_nothing(ray_cluster: str, micro_base: Path, tmp_path: Path) -> None:
    draw = random.Random(20)
    wanted = [kind for kind in ["driver", *KINDS] for _ in range(-(-KILLS // (1 + len(KINDS))))][:KILLS]
    draw.shuffle(wanted)
    undisturbed = _config(tmp_path / "undisturbed", micro_base)
    _run_through(undisturbed, [], draw)
    rows = []
    for at in range(0, KILLS, PER_RUN):
        config = _config(tmp_path / f"run{at}", micro_base)
        rows += _run_through(config, wanted[at : at + PER_RUN], draw)
        assert steps(config) == list(range(1, STEPS + 1)), "no step is missing or doubled"
        ledger = ledger_of(config)
        ledger.audit()
        counts = ledger.counts()
        assert counts["trained"] + counts["filtered"] == STEPS * config.rl.problems_per_step, counts
        read_adapter(next((config.run_dir / "checkpoints").glob(f"step-{STEPS:06d}")))
        assert weights(config) == weights(undisturbed), "the final adapter is not the one of an undisturbed run"
    table = _table(rows)
    print("\n" + table)
    out = Path(os.environ.get("RLSYS_SOAK_OUT", str(tmp_path)))
    (out / "kills.json").write_text(json.dumps(rows, indent=2))
    (out / "kills.txt").write_text(table + "\n")
    assert len(rows) == KILLS


def _config(where: Path, base: Path) -> JobConfig:
    return parse_config(
        JOB,
        [
            f"model.path={base}",
            f"run.dir={where}",
            f"rl.steps={STEPS}",
            "rewards.function=tests.ray.graders:slow_variety",
        ],
    )


def _run_through(config: JobConfig, kinds: list[str], draw: random.Random) -> list[dict[str, object]]:
    """One run with these kills, each after a step that was made since the one before."""
    config.run_dir.parent.mkdir(parents=True)
    (config.run_dir.parent / "job.yaml").write_text(dump_config(config))
    driver = _begin(config)
    rows, todo = [], list(kinds)
    while todo or driver.poll() is None:
        done = _last_step(config)
        if todo and done >= 1 and driver.poll() is None:
            time.sleep(draw.uniform(0, 0.8))
            kind, before = todo.pop(0), _last_step(config)
            victim = _kill(kind, driver, draw)
            began = time.monotonic()
            if kind == "driver":
                driver.wait()
                driver = _begin(config)
            _wait_for(lambda before=before: _last_step(config) > before, config, driver)  # type: ignore[misc]
            rows.append({"kind": kind, "step": before, "pid": victim, "seconds": round(time.monotonic() - began, 2)})
        elif driver.poll() is None:
            time.sleep(0.1)
        else:
            break
    assert not todo, f"the run ended before {todo} could be killed"
    assert exit_code(driver, "the run", *_signs(config), state=lambda: _output(config)) == 0, _output(config)
    return rows


def _begin(config: JobConfig) -> subprocess.Popen[bytes]:
    with (config.run_dir.parent / "output").open("a") as file:
        command = [sys.executable, "-m", "rlsys", "train", str(config.run_dir.parent / "job.yaml")]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def _kill(kind: str, driver: subprocess.Popen[bytes], draw: random.Random) -> int:
    if kind == "driver":
        driver.send_signal(signal.SIGKILL)
        return driver.pid
    return until(lambda: _killed_one(KINDS[kind](), draw), f"a {kind} to kill", cpu_of(os.getpid()))


def _killed_one(candidates: list[psutil.Process], draw: random.Random) -> int:
    try:
        victim = draw.choice(candidates)
        victim.send_signal(signal.SIGKILL)
    except (IndexError, psutil.Error):
        return 0
    return victim.pid


def _last_step(config: JobConfig) -> int:
    if not (config.run_dir / "metrics.jsonl").is_file():
        return 0
    return max((line["step"] for line in read_metrics(config.run_dir) if "reward/mean" in line), default=0)


def _wait_for(condition: Callable[[], bool], config: JobConfig, driver: subprocess.Popen[bytes]) -> None:
    over = lambda: condition() or driver.poll() is not None  # noqa: E731
    until(over, "a step", *_signs(config), cpu_of(driver.pid), state=lambda: _output(config))
    assert driver.poll() in (None, 0), _output(config)


def _signs(config: JobConfig) -> list[Sign]:
    return [size_of(config.run_dir.parent / "output"), size_of(config.run_dir / "metrics.jsonl"), cpu_of(os.getpid())]


def _output(config: JobConfig) -> str:
    return (config.run_dir.parent / "output").read_text()[-4000:]


def _table(rows: list[dict[str, object]]) -> str:
    lines = ["killed      times  seconds to the next step made (median, longest)"]
    for kind in sorted({str(row["kind"]) for row in rows}):
        seconds = [float(str(row["seconds"])) for row in rows if row["kind"] == kind]
        lines.append(f"{kind:10}  {len(seconds):5}  {statistics.median(seconds):6.1f}  {max(seconds):6.1f}")
    return "\n".join(lines)
