"""Memory of each process of a job: ``python -m benchmarks.process_memory [KEY=VALUE...]``.

Runs a job of two steps on a random Qwen3 of two layers, so that the figures are those of the imports and of Ray, and
prints each role's largest resident size (RSS) and unique set size (USS, the memory that ends with the process). RSS
counts the pages of shared libraries and of the object store in each process that maps them, USS in none. A driver and
an actor that import Ray alone are measured too: no process of a job can need less. The last lines are what the learner
computed and the hash of its adapter, to compare two revisions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
POLL_S = 0.25
MIB = 2**20
# How the title of a process begins, and its role. The checkpointer is a thread of the driver.
ROLES = {
    "ray::RewardActor": "reward actor",
    "ray::GroupAdvantageActor": "advantage actor",
    "ray::LearnerActor": "learner",
    "ray::SamplerActor": "sampler",
    "VLLM::EngineCore": "engine",
    "ray::IDLE": "idle Ray worker",
}
JOB = """
run: {name: memory, seed: 5}
model: {dtype: float32, max_length: 96}
task: {train_problems: 32, eval_problems: 8}
lora: {rank: 4, alpha: 8}
sampler: {max_num_seqs: 64, max_num_batched_tokens: 512, kv_cache_gb: 0.25}
rewards: {function: "benchmarks.process_memory:variety"}
rl: {steps: 2, problems_per_step: 4, samples_per_problem: 4, sampling: {max_tokens: 12}, optim: {learning_rate: 1.0e-2}}
eval: {every_steps: 0, max_tokens: 12}
tracking: {wandb: offline}
"""
MAKE_BASE = """
import sys
from pathlib import Path
from rlsys import tasks
from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import MakeSection, parse_config
from rlsys.modeling.base_model import initial_model
from benchmarks.process_memory import JOB
shape = MakeSection(vocab_size=160, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32,
                    intermediate_size=64)
task = tasks.build(parse_config(JOB, ["model.path=x"]).task, 0)
tokenizer = build_tokenizer([problem.prompt for problem in task.problems("train")], shape.vocab_size)
initial_model(shape, tokenizer, max_length=96, seed=3, out=Path(sys.argv[1]))
"""
FLOOR = """
import os, psutil, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
@ray.remote
class Empty:
    def pid(self):
        return os.getpid()
actor = Empty.remote()
for pid in (os.getpid(), ray.get(actor.pid.remote())):
    memory = psutil.Process(pid).memory_full_info()
    print(memory.rss, memory.uss)
"""


def variety(completion: str, answer: str) -> float:
    """A grade that a random model does not always miss: equal rewards would give no gradient."""
    return len(set(completion)) / max(1, len(completion))


def run(command: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Run a driver and poll its process tree. Returns the largest (RSS, USS) of a process of each role, in bytes."""
    peaks: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryFile("w+") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=log)
        while driver.poll() is None:
            for role, rss, uss in _measured(driver.pid):
                before = peaks.get(role, (0, 0))
                peaks[role] = max(before[0], rss), max(before[1], uss)
            time.sleep(POLL_S)
        log.seek(0)
        if driver.returncode:
            raise SystemExit(f"the job failed ({driver.returncode}):\n{log.read()[-3000:]}")
    return peaks


def _measured(driver: int) -> Iterator[tuple[str, int, int]]:
    try:
        processes = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            role = "driver" if process.pid == driver else _role(process)
            if role is not None:
                memory = process.memory_full_info()
                yield role, memory.rss, memory.uss
        except psutil.Error:  # it ended meanwhile
            continue


def _role(process: psutil.Process) -> str | None:
    role = _named(process)
    if role is None and any(_named(parent) == "reward actor" for parent in process.parents()):
        return "grader process"  # or the server that forks them
    return role


def _named(process: psutil.Process) -> str | None:
    title = " ".join(process.cmdline())
    return next((role for name, role in ROLES.items() if title.startswith(name)), None)


def floor() -> dict[str, tuple[int, int]]:
    """(RSS, USS) of a driver and an actor that import nothing but Ray."""
    done = subprocess.run([sys.executable, "-c", FLOOR], env=_environment(), capture_output=True, text=True, check=True)
    driver, actor = (tuple(map(int, line.split())) for line in done.stdout.splitlines()[-2:])
    return {"driver, Ray alone": (driver[0], driver[1]), "actor, Ray alone": (actor[0], actor[1])}


def computed(run_dir: Path) -> str:
    """Numbers of each step, and the hash of the adapter: equal on two revisions that compute the same."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    wanted = ("step", "reward/mean", "policy/grad_norm", "policy/kl_k1", "policy/logprob_diff_mean")
    steps = [{name: line[name] for name in wanted} for line in lines if "reward/mean" in line]
    adapter = hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    return "\n".join([*map(json.dumps, steps), f"adapter {adapter}"])


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    overrides = parser.parse_args().overrides
    with tempfile.TemporaryDirectory(prefix="rlsys-memory-") as name:
        scratch = Path(name)
        subprocess.run([sys.executable, "-c", MAKE_BASE, str(scratch / "base")], env=_environment(), check=True)
        (scratch / "job.yaml").write_text(JOB)
        places = [f"model.path={scratch / 'base'}", f"run.dir={scratch / 'runs'}"]
        command = [sys.executable, "-m", "rlsys", "train", str(scratch / "job.yaml"), *places, *overrides]
        peaks = floor() | run(command)
        result = computed(scratch / "runs" / "memory")
    print(f"{'process':<18} {'RSS':>6} {'USS':>6}   (largest, MiB)")
    for role, (rss, uss) in sorted(peaks.items()):
        print(f"{role:<18} {rss / MIB:>6.0f} {uss / MIB:>6.0f}")
    print(result)


if __name__ == "__main__":
    main()
