"""Five kinds of stall: the message that `rlsys train` prints, and the seconds until it appears.

    python -m benchmarks.stalls [--limit 10]

Each is a job on a tiny random model with its own Ray cluster; `--limit` sets the watchdog's limit (default in a job:
120 s).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rlsys import tasks
from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import MakeSection, parse_config
from rlsys.modeling.base_model import initial_model

MODEL = MakeSection(
    vocab_size=160, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64
)
JOB = """
run: {{name: stall, seed: 5, dir: {where}}}
cluster: {{num_cpus: 4}}
watchdog: {{limit_s: {limit}}}
model: {{path: {base}, max_length: 96}}
task: {{train_problems: 32, eval_problems: 8}}
lora: {{rank: 4}}
sampler: {{num_cpus: 0.5, max_num_seqs: 64, max_num_batched_tokens: 512, kv_cache_gb: 0.25}}
rewards: {{function: "tests.ray.graders:variety"}}
rl: {{steps: 100000, problems_per_step: 4, samples_per_problem: 4, sampling: {{max_tokens: 12}}}}
eval: {{every_steps: 0, max_tokens: 12}}
tracking: {{wandb: disabled}}
"""
STARTED_S = 240.0
Act = Callable[[psutil.Process], None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=float, default=10.0)
    limit = parser.parse_args().limit
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = _base(folder)
        text = JOB.format(where=folder, base=base, limit=limit)
        cases: list[tuple[str, list[str], Act | None]] = [
            ("an engine that stands still", [], lambda driver: _send(driver, "EngineCore", signal.SIGSTOP)),
            ("a sampler killed, none may be replaced", ["cluster.max_restarts=0"],
             lambda driver: _send(driver, "ray::SamplerActor", signal.SIGKILL)),
            ("a grader that never returns", ["rewards.function=tests.ray.graders:sleeper"], None),
            ("a placement that cannot be had", ["learner.num_workers=9"], None),
            ("a learner rank that stands still", ["learner.num_workers=2", "learner.num_cpus=0.5"],
             lambda driver: _send(driver, "ray::LearnerActor", signal.SIGSTOP)),
        ]  # fmt: skip
        for name, overrides, act in cases:
            _show(name, text, overrides, act, folder)


def _show(name: str, text: str, overrides: list[str], act: Act | None, folder: Path) -> None:
    shutil.rmtree(folder / "stall", ignore_errors=True)
    (folder / "job.yaml").write_text(text)
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "rlsys", "train", str(folder / "job.yaml"), *overrides]
    began = time.monotonic()
    driver = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if act is not None:
        _wait_for_step(folder / "stall" / "metrics.jsonl", driver)
        act(psutil.Process(driver.pid))
        began = time.monotonic()
    said = driver.communicate(timeout=STARTED_S)[0].splitlines()
    seconds = time.monotonic() - began
    first = next((i for i, line in enumerate(said) if "Error: " in line), 0)
    print(f"## {name}: exit code {driver.returncode} after {seconds:.1f} s{'' if act else ' from the command on'}")
    print("\n".join(f"    {line[:300]}" for line in said[first : first + 8]), flush=True)


def _wait_for_step(metrics: Path, driver: subprocess.Popen[str]) -> None:
    end = time.monotonic() + STARTED_S
    while not (metrics.is_file() and '"step": 3' in metrics.read_text()):
        if driver.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the job did not start: {driver.communicate()[0]}")
        time.sleep(0.1)


def _send(driver: psutil.Process, title: str, number: signal.Signals) -> None:
    """To the last process of that title, so of two ranks to the second."""
    found = [process for process in driver.children(recursive=True) if title in " ".join(process.cmdline())]
    max(found, key=lambda process: process.create_time()).send_signal(number)


def _base(folder: Path) -> Path:
    job = parse_config(JOB.format(where=folder, base="x", limit=1))
    problems = tasks.build(job.task, 0).problems("train")
    tokenizer = build_tokenizer([problem.prompt for problem in problems], MODEL.vocab_size)
    out = folder / "base"
    initial_model(MODEL, tokenizer, max_length=96, seed=3, out=out)
    return out


if __name__ == "__main__":
    main()
