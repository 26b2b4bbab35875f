"""Memory that does not suffice costs speed, not the run. All failures here are real ones of torch's allocator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_learner import Models

from rlsys.budget import LEAST, TokenBudget
from rlsys.errors import ActorFailedError
from rlsys.ranks import ALONE, Ranks, is_out_of_memory

TOO_MUCH = 2**52  # bytes; more than any address space


def allocating(budget: TokenBudget, fits: int, seen: list[int]) -> int:
    """Fails as torch does while the budget is above what fits."""
    seen.append(budget.tokens)
    torch.empty(TOO_MUCH if budget.tokens > fits else 1, dtype=torch.uint8)
    return budget.tokens


def test_the_budget_is_halved_until_the_work_fits_and_stays_there() -> None:
    budget, seen = TokenBudget(4096, ALONE), list[int]()
    assert budget.fitting(lambda: allocating(budget, 1100, seen)) == 1024
    assert budget.fitting(lambda: allocating(budget, 1100, seen)) == 1024
    assert seen == [4096, 2048, 1024, 1024] and budget.most == 4096


def test_work_that_never_fits_ends_with_what_would_help() -> None:
    budget = TokenBudget(200, ALONE)
    with pytest.raises(ActorFailedError, match=rf"micro-batches of {LEAST} tokens; wanted shorter sequences"):
        budget.fitting(lambda: allocating(budget, 0, []))


def test_other_failures_are_not_tried_again() -> None:
    budget, calls = TokenBudget(4096, ALONE), []

    def work() -> None:
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        budget.fitting(work)
    assert len(calls) == 1 and budget.tokens == 4096


def test_ranks_in_the_midst_of_a_shared_pass_do_not_begin_anew() -> None:
    ranks = Ranks(0, 2)
    ranks.shards = True
    budget = TokenBudget(4096, ranks)
    with pytest.raises(ActorFailedError, match=r"token budget of 4096.*smaller learner.token_budget"):
        budget.fitting(lambda: allocating(budget, 0, []))


def test_pythons_own_memory_errors_count_too() -> None:
    with pytest.raises(MemoryError) as caught:
        bytearray(2**62)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(ValueError("memory"))


IN_LITTLE_MEMORY = """
import json, resource, sys
import numpy as np, torch
from rlsys import losses
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.datums import DatumBatch
from rlsys.learner import Learner

path, limited = sys.argv[1], sys.argv[2] == "limited"
random = np.random.default_rng(0)
offsets = np.arange(0, 40 * 400 + 1, 400)
batch = DatumBatch(
    random.integers(0, 64, 16000).astype(np.int32), random.integers(0, 64, 16000).astype(np.int32), offsets,
    {"weights": np.ones(16000, np.float32)},
)
learner = Learner(path, ModelSection(path=path, max_length=512), LearnerSection(token_budget=16000))
learner.create_run("run", LoraSection(rank=4), 0)
loss = losses.resolve("cross_entropy")
few = DatumBatch(batch.tokens[:400], batch.targets[:400], offsets[:2], {"weights": batch.columns["weights"][:400]})
learner.forward_backward("run", few, loss)  # kernels and thread pools are made
if limited:
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 16 * 2**20, -1))
result = learner.forward_backward("run", batch, loss)
norm = learner.optim_step("run", __import__("rlsys.types").types.AdamParams())["grad_norm"]
print(json.dumps({"loss": result.loss_sum, "norm": norm, "tokens": learner.token_budget.tokens}))
"""


def test_a_learner_that_runs_out_of_memory_makes_the_same_update_in_smaller_micro_batches(tiny_model: Models) -> None:
    path = tiny_model(True)

    def ran(how: str) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", IN_LITTLE_MEMORY, str(path), how],
            capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    whole, limited = ran("free"), ran("limited")
    assert whole["tokens"] == 16000 and LEAST <= limited["tokens"] < 16000
    assert limited["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert limited["norm"] == pytest.approx(whole["norm"], rel=1e-5)
