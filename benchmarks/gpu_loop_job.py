"""Runs and monitors `rlsys train` on the arithmetic task: a part of `make gpu-loop` (benchmarks/gpu_loop.py).

The first job trains its base from scratch; a later job in the same folder uses that base. With `--kill` the engine gets
SIGKILL after the second step, and the job must finish all its steps with a new engine.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.machine.gpus import this_machine
from benchmarks.gpu_journal import Notes
from benchmarks.gpu_loop_part import GIB, NOT_ON_CPU, part_options, run_and_exit
from benchmarks.gpu_processes import ROOT, descendants, end_process, engines, last_error, resident_peak, title
from rlsys.architectures.model_shape import model_shape
from rlsys.config import JobConfig, load_config
from rlsys.planning.plan import plan
from rlsys.run_state.jsonl import read_metrics

CONFIG = ROOT / "configs" / "quickstart.yaml"
LOOK_S = 0.25
KILL_AFTER = 2  # steps
STAGE = re.compile(
    r"^(.+): (started|(?:done|stopped) after [\d:]+)"
)  # as rlsys/tracking/progress.py writes where no terminal is
ROLES = {"ray::LearnerActor": "learner", "ray::SamplerActor": "sampler", "VLLM::EngineCore": "sampler"}
RUNS = "runs"  # of the folder: run directories
COMMON = "tracking.wandb=disabled rl.substeps=1 cluster.max_restarts=3"
CUDA = """
rl.steps=6 eval.every_steps=0 model.dtype=bfloat16 learner.num_gpus=0.5 sampler.num_gpus=0.5
sampler.gpu_memory_utilization=0.3 sampler.enforce_eager=true
"""
CPU = """
rl.steps=4 eval.every_steps=0 learner.num_cpus=0.5 sampler.num_cpus=0.5 sampler.kv_cache_gb=0.25
rl.problems_per_step=8 rl.samples_per_problem=8 task.eval_problems=16 task.train_problems=256
task.min_operations=1 task.max_operations=2 task.supervised_max_operations=2
"""
CPU_BASE = """
model.make.supervised.first_check_step=60 model.make.supervised.check_every_steps=20
model.make.supervised.gate_accuracy=0.1 model.make.supervised.gate_problems=20 model.make.supervised.decay_steps=40
"""


def overrides(folder: Path, name: str, device: str, colocate: bool, asked: list[str]) -> list[str]:
    """Overrides of configs/quickstart.yaml; `asked` comes last and takes precedence."""
    found = [*COMMON.split(), *(CUDA if device == "cuda" else CPU).split()]
    found += [f"run.name={name}", f"run.dir={folder / RUNS}", f"sampler.colocate={str(colocate).lower()}"]
    made = [base for base in sorted((folder / RUNS).glob("*/base")) if base.parent.name != name]
    if made:
        found += ["model.make=null", f"model.path={made[0]}"]
    elif device == "cpu":
        found += CPU_BASE.split()
    mine = [key for key in found if key.partition("=")[0] not in {one.partition("=")[0] for one in asked}]
    return [*mine, *asked]


@dataclass
class Watch:
    """Monitor of a running job."""

    notes: Notes
    config: JobConfig
    driver: subprocess.Popen[bytes]
    kills: bool
    log: Path  # what the driver prints
    seen: int = 0  # lines of metrics.jsonl
    told: int = 0  # lines of the log
    steps: set[int] = field(default_factory=set)
    peaks: dict[int, tuple[str, int]] = field(default_factory=dict)  # pid -> (role, bytes)
    killed: tuple[int, float, int] | None = None  # pid, when, step after which
    recovered: bool = False
    began: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        for process in descendants(self.driver.pid):
            name = title(process)
            role = next((role for prefix, role in ROLES.items() if name.startswith(prefix)), None)
            if role is not None:
                self.peaks[process.pid] = (role, max(resident_peak(process), self.peaks.get(process.pid, ("", 0))[1]))
        printed = self.log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        whole = [line for line in printed if line.endswith("\n")]
        for line in whole[self.told :]:
            if stage := STAGE.match(line):
                self.notes.fact(f"stage: {stage[1]}", stage[2], seconds=round(time.monotonic() - self.began, 1))
        self.told = len(whole)
        lines = read_metrics(self.config.run_dir)
        for record in lines[self.seen :]:
            self._line(record)
        self.seen = len(lines)
        if self.kills and self.killed is None and max(self.steps, default=0) >= KILL_AFTER:
            self._kill()

    def _line(self, line: Mapping[str, Any]) -> None:
        step, elapsed = int(line["step"]), round(time.monotonic() - self.began, 1)
        if line["stage"] == "sft":
            if "sft/gate_accuracy" in line:
                note: dict[str, Any] = {"seconds": elapsed, "tokens_per_s": line.get("sft/tokens_per_s")}
                self.notes.fact(f"base, step {step}: gate accuracy", line["sft/gate_accuracy"], **note)
            return
        if "eval/accuracy" in line:
            self.notes.fact(f"step {step}: accuracy on held-out problems", line["eval/accuracy"], seconds=elapsed)
        if "reward/mean" in line:
            self.steps.add(step)
            self._step(step, line)

    def _step(self, step: int, line: Mapping[str, Any]) -> None:
        fact = self.notes.fact
        fact(
            f"step {step}: sampler", line["sampler/tokens_per_s"], "tokens/s", tokens=line["sampler/completion_tokens"]
        )
        if line.get("policy/tokens"):
            fact(f"step {step}: learner", line["policy/tokens"] / line["time/learn_s"], "tokens of completions/s")
            fact(f"step {step}: mean |p - q|", line["policy/logprob_diff_mean"], "nats")
        for name, value in line.items():
            if name.startswith("policy/logprob_diff_") and name.count("_") > 3:
                fact(f"step {step}: {name.removeprefix('policy/')}", value, "nats")
        if "sync/canary_new" in line:
            apart = {"separation": line["sync/separation"], "bytes": line["sync/bytes"]}
            fact(f"step {step}: sync, canary of the sampler to the learner", line["sync/canary_new"], "nats", **apart)
        times = {
            name.removeprefix("time/"): round(value, 3) for name, value in line.items() if name.startswith("time/")
        }
        fact(f"step {step}: took", line["time/step_s"], "s", **times)
        if self.killed is not None and not self.recovered:
            self.recovered = True
            again = {"groups_sampled_again": line.get("sampler/resampled_groups", 0.0), "step": step}
            fact("from the engine's death to the end of the next step", time.monotonic() - self.killed[1], "s", **again)

    def _kill(self) -> None:
        for engine in engines(self.driver.pid)[:1]:
            engine.send_signal(signal.SIGKILL)
            self.killed = (engine.pid, time.monotonic(), max(self.steps))
            self.notes.fact("engine killed (SIGKILL)", f"pid {engine.pid}", after_step=max(self.steps))


def watch(options: argparse.Namespace, notes: Notes) -> None:
    folder, name = options.folder, options.part.replace(" ", "-")
    keys = overrides(folder, name, options.device, options.colocate, options.set)
    config = load_config(CONFIG, keys)
    notes.fact("command", " ".join(["rlsys train", "configs/quickstart.yaml", *keys]))
    _predictions(notes, config)
    log = folder / f"{name}.train.log"
    command = [sys.executable, "-m", "rlsys", "train", str(CONFIG), *keys, "--fresh"]
    with log.open("wb") as output, gpu_memory(folder / f"{name}.gpu-memory", options.device) as used:
        driver = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
        seen = Watch(notes, config, driver, options.kill, log)
        try:
            while driver.poll() is None:
                seen.look()
                time.sleep(LOOK_S)
        finally:
            end_process(driver)
        seen.look()
    _ended(notes, config, seen, log)
    _memory(notes, config, seen)
    most = used()
    notes.fact("GPU memory in use, at most", most, "GiB" if isinstance(most, float) else "")


def _predictions(notes: Notes, config: JobConfig) -> None:
    """Record the predictions of `rlsys plan` before the job starts."""
    planned = plan(config, model_shape(config.model), [this_machine(config.cluster.num_cpus)])
    for row in planned.rows:
        peak = row.memory.peak
        where = "GiB of the GPU" if row.on_gpu else "GiB of the process, above imports"
        notes.fact(f"rlsys plan: peak of the {row.role}", peak.total / GIB, where, phase=peak.name)
    for problem in planned.shortfalls:
        notes.fact("rlsys plan: shortfall", problem)


def _ended(notes: Notes, config: JobConfig, seen: Watch, log: Path) -> None:
    code, steps = seen.driver.returncode, len(seen.steps)
    if code != 0:
        notes.fact("error of the job", last_error(log), log=log.name)
    notes.check("exit code of rlsys train", code, 0)
    notes.check("steps made", steps, config.rl.steps, ">=")
    if seen.kills:
        notes.check("engine killed on the way, and steps made with another one", float(seen.recovered), 1, ">=")


def _memory(notes: Notes, config: JobConfig, seen: Watch) -> None:
    """Compare resident peaks of processes with the plan's predictions, imports included."""
    planned = plan(config, model_shape(config.model), [this_machine(config.cluster.num_cpus)])
    for row in planned.rows:
        peaks = sorted((size for role, size in seen.peaks.values() if role == row.role), reverse=True)
        processes = 2 if row.role == "sampler" else 1  # the actor and its engine
        if peaks:
            found = sum(peaks[:processes]) / GIB
            more = {"planned": round(row.host_bytes / GIB, 3), "ratio": round(found * GIB / row.host_bytes, 3)}
            notes.fact(f"resident memory of the {row.role}, at most", found, "GiB", **more)


@contextmanager
def gpu_memory(path: Path, device: str) -> Iterator[Callable[[], Any]]:
    """nvidia-smi writes the memory in use once a second; yields a function that gives the most so far, in GiB."""
    smi = shutil.which("nvidia-smi") if device == "cuda" else None
    if smi is None:
        yield lambda: NOT_ON_CPU if device == "cpu" else "nvidia-smi is not there"
        return
    with path.open("w") as output:
        query = [smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop=1"]
        process = subprocess.Popen(query, stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield lambda: max((float(line) / 1024 for line in path.read_text().split()), default=0.0)
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run_and_exit(part_options("--colocate", "--kill"), watch)
