"""A pretrained model in bfloat16: the learner beside transformers over 1,500 positions, and a whole job."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.real_model import FOLDER
from rlsys.architectures.precision import multiplies_bfloat16
from rlsys.config import LearnerSection, ModelSection
from rlsys.learner.learner import Learner
from rlsys.run_state.jsonl import read_metrics
from rlsys.types import Array
from tests.waiting import run

ROOT = Path(__file__).parents[2]
RANGES = ((1, 64), (64, 256), (256, 512), (512, 1024), (1024, 1536))

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER.name} is not here; `make real-model` brings it")


def text_tokens(count: int) -> Array:
    """Of this repository's own prose."""
    from transformers import AutoTokenizer

    text = (ROOT / "docs" / "grading.md").read_text("utf-8")
    ids = AutoTokenizer.from_pretrained(FOLDER)(text)["input_ids"]
    assert len(ids) >= count
    return np.asarray(ids[:count], np.int32)


def transformers_logprobs(tokens: Array, implementation: str) -> Array:
    """(T - 1,) of tokens 1..T-1, from the model as transformers loads it in bfloat16."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16, attn_implementation=implementation)
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None], dtype=torch.int64)).logits[0, :-1].float()
    scores: Array = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:, None], dtype=torch.int64))[:, 0].numpy()
    return scores


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU has no kernels for bfloat16: a learner takes float32")
def test_the_learner_is_no_further_from_transformers_than_two_of_its_kernels_at_any_position() -> None:
    torch.set_num_threads(1)
    tokens = text_tokens(1536)
    model = ModelSection(path=str(FOLDER), dtype="bfloat16", max_length=2048)
    learner = Learner(FOLDER, model, LearnerSection()).logprobs(None, tokens, np.array([0, len(tokens)]))[1:]
    sdpa, eager = (transformers_logprobs(tokens, implementation) for implementation in ("sdpa", "eager"))
    for first, last in RANGES:
        part = slice(first - 1, last - 1)
        ours, theirs = np.abs(learner - sdpa)[part].mean(), np.abs(eager - sdpa)[part].mean()
        print(f"positions {first}-{last}: learner {ours:.4f}, eager {theirs:.4f} nats from sdpa")
        assert (
            ours <= 1.25 * theirs
        )  # the bound on a mean of 63 positions at least; a fault of positions is several times


def test_a_job_in_bfloat16_runs_as_it_comes(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("rlsys")), "train", "configs/calculator-smollm2-135m.yaml",
        f"run.dir={tmp_path}", f"model.path={FOLDER}", "rl.steps=1", "rl.problems_per_step=2",
        "rl.samples_per_problem=4", "task.eval_problems=2", "rl.sampling.max_tokens=8", "eval.max_tokens=8",
        "tracking.wandb=disabled", "rewards.function=tests.ray.graders:variety",
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = run(command, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "was not forked" not in done.stdout, "learner and sampler of two threads"
    lines = read_metrics(tmp_path / "calculator-smollm2-135m")
    (step,) = [line for line in lines if "reward/mean" in line]
    assert 0.0 < step["policy/logprob_diff_mean"] < (0.15 if multiplies_bfloat16() else 1e-3)
    assert ("the CPU of sampler 0 has no kernels for bfloat16" in done.stdout) is not multiplies_bfloat16()
