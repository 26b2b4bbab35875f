"""A job of `rlsys train` and a client of `rlsys serve` compute the same."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlsys.advantages import to_minibatches
from rlsys.config import JobConfig
from rlsys.datums import DatumBatch
from rlsys.run_state.jsonl import read_metrics
from rlsys.run_state.saved_config import read_saved_config
from rlsys.run_state.saved_rollouts import load_step
from rlsys.types import Array
from tests import waiting
from tests.serve.clients import ROOT, SDKS, Server, seen

STEPS = 2
JOB = f"""
run: {{name: twin, seed: 5}}
model: {{dtype: float32, max_length: 256}}
task: {{train_problems: 16, eval_problems: 4}}
lora: {{rank: 8, alpha: 32}}
cluster: {{num_cpus: 2, object_store_gb: 0.3}}
learner: {{num_cpus: 0.5}}
sampler: {{num_cpus: 0.5, max_num_seqs: 16, max_num_batched_tokens: 512, kv_cache_gb: 0.1}}
rewards: {{function: "tests.ray.graders:variety"}}
rl:
  {{steps: {STEPS}, problems_per_step: 4, samples_per_problem: 4, sampling: {{max_tokens: 12}}, loss: {{name: ppo}},
    advantages: {{baseline: none}},
    optim: {{learning_rate: 1.0e-2, warmup_steps: 2, eps: 1.0e-8}}}}
eval: {{every_steps: 0, max_tokens: 12}}
tracking: {{rollout_steps: {STEPS}}}
"""


def test_steps_of_a_job_are_the_same_steps_through_the_server(server: Server, tmp_path: Path) -> None:
    run = trained(server.model, tmp_path)
    config = read_saved_config(run)
    steps = [{"data": sent(batch(run, config, i)), "adam": adam(config, i)} for i in range(1, STEPS + 1)]
    told = {"seed": config.run.seed, "rank": config.lora.rank, "loss": config.rl.loss.name, "steps": steps}
    (tmp_path / "steps.json").write_text(json.dumps(told))
    said = seen(server, SDKS[-1], "job_steps", tmp_path, str(tmp_path / "steps.json"))
    found = [line for line in said if line.get("saw") == "a step"]
    wanted = [row for row in read_metrics(run) if "loss/sum" in row]
    assert len(found) == len(wanted) == STEPS
    for one, other in zip(found, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss/sum"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["policy/grad_norm"], rel=1e-5)
    (path,) = (line["path"] for line in said if line.get("saw") == "the adapter")
    assert apart(load_file(run / "adapter" / ADAPTER), load_file(folder_of(server, path) / ADAPTER)) < 1e-4


ADAPTER = "adapter_model.safetensors"


def trained(base: str, folder: Path) -> Path:
    """The folder of a job's run."""
    (folder / "job.yaml").write_text(JOB)
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "rlsys", "train", "job.yaml", f"model.path={base}", f"run.dir={folder}"]
    done = waiting.run(command, cwd=folder, env={**kept, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "twin"


def batch(run: Path, config: JobConfig, step: int) -> DatumBatch:
    """The datums of a step, from its saved rollouts."""
    recorded = load_step(run, step)
    (only,), *_ = to_minibatches(recorded.rollouts, recorded.rewards, config.rl, recorded.pieces, recorded.reference)
    return only


def sent(batch: DatumBatch) -> list[dict[str, list[float]]]:
    columns = {"ids": batch.tokens, "target_tokens": batch.targets}
    columns |= {key: batch.columns[key] for key in ("logprobs", "advantages")}
    ranges = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    return [{key: column[start:end].tolist() for key, column in columns.items()} for start, end in ranges]


def adam(config: JobConfig, step: int) -> dict[str, float]:
    return dataclasses.asdict(config.rl.optim.at(step - 1, config.rl.steps))


def folder_of(server: Server, path: str) -> Path:
    """Where the server keeps what it answered with `path`."""
    root = re.search(r"checkpoints: (\S+)", server.log.read_text())
    run_id, kind, name = path.removeprefix("tinker://").split("/")
    assert root is not None
    (found,) = Path(root[1]).glob(f"*/{run_id.replace(':', '.')}/{kind}/{name}")
    return found


def apart(one: dict[str, Array], other: dict[str, Array]) -> float:
    """Distance of two adapters, relative to how far the first is from zero in B, that is, from the base."""
    assert one.keys() == other.keys()
    moved = [name for name in one if "lora_B" in name]
    gap = np.sqrt(sum(float(np.square(one[name] - other[name]).sum()) for name in one))
    size = np.sqrt(sum(float(np.square(one[name]).sum()) for name in moved))
    assert size > 0
    return float(gap / size)
