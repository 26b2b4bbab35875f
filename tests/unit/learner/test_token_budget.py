"""Memory that does not suffice costs speed, not the run. All failures here are real ones of torch's allocator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlsys.distributed.ranks import ALONE, Ranks, is_out_of_memory
from rlsys.errors import ActorFailedError
from rlsys.learner.token_budget import LEAST, TokenBudget
from tests.forked import run_forked
from tests.unit.tiny_learner import Models

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


def test_what_can_be_given_up_goes_before_the_budget_does() -> None:
    budget, seen, given_up = TokenBudget(4096, ALONE), list[int](), list[bool]()

    def instead() -> bool:
        given_up.append(len(given_up) == 0)
        return given_up[-1]

    assert budget.fitting(lambda: allocating(budget, 2048, seen), instead) == 2048
    assert seen == [4096, 4096, 2048] and given_up == [True, False]


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
from rlsys.learner.learner import Learner
from rlsys.types import AdamParams, Datum, ModelInput

path, limit_mib, budget, custom = sys.argv[1], *map(int, sys.argv[2:])
random = np.random.default_rng(0)
count = 24_000 if custom else 16_000
offsets = np.arange(0, count + 1, 400)
batch = DatumBatch(
    random.integers(0, 64, count).astype(np.int32), random.integers(0, 64, count).astype(np.int32), offsets,
    {"weights": np.ones(count, np.float32)},
)
section = LearnerSection(token_budget=budget, custom_graph_gb=100)
learner = Learner(path, ModelSection(path=path, max_length=512), section)
learner.runs.create("run", LoraSection(rank=4), 0)
loss = losses.resolve("cross_entropy")
few = DatumBatch(batch.tokens[:400], batch.targets[:400], offsets[:2], {"weights": batch.columns["weights"][:400]})
learner.forward_backward("run", few, loss)  # kernels and thread pools are made
data = [Datum(ModelInput.from_ints(batch.tokens[i:i + 400]), {}) for i in offsets[:-1]]

def negative(data, logprobs):
    return -sum(logp.sum() for logp in logprobs), {}

if limit_mib:
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + limit_mib * 2**20, -1))
if custom:
    result = learner.forward_backward_custom("run", batch, data, negative)
else:
    result = learner.forward_backward("run", batch, loss)
norm, passes = learner.optim_step("run", AdamParams())["grad_norm"], result.metrics.get("custom_passes:unique", 0.0)
print(json.dumps({"loss": result.loss_sum, "norm": norm, "tokens": learner.token_budget.tokens, "passes": passes}))
"""


def ran(path: Path, limit_mib: int, budget: int, *, custom: bool = False) -> dict[str, float]:
    """In a process of its own that may grow by so much, 0 for as it likes. What is free in its heap comes in addition,
    some 40 MiB: the batches need more than both."""
    done = run_forked(IN_LITTLE_MEMORY, *map(str, (path, limit_mib, budget, int(custom))))
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_custom_loss_that_runs_out_of_memory_gives_up_graphs_before_the_token_budget(tiny_model: Models) -> None:
    path = tiny_model(True)
    whole, limited = ran(path, 0, 800, custom=True), ran(path, 8, 800, custom=True)
    assert (whole["passes"], limited["passes"]) == (1.0, 2.0)
    assert limited["tokens"] == 800
    assert limited["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert limited["norm"] == pytest.approx(whole["norm"], rel=1e-5)


def test_a_learner_that_runs_out_of_memory_makes_the_same_update_in_smaller_micro_batches(tiny_model: Models) -> None:
    path = tiny_model(True)
    whole, limited = ran(path, 0, 16000), ran(path, 4, 16000)
    assert whole["tokens"] == 16000 and LEAST <= limited["tokens"] < 16000
    assert limited["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert limited["norm"] == pytest.approx(whole["norm"], rel=1e-5)
