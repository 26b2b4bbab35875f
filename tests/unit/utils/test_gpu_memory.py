"""A learner on a GPU that it shares: its part, what it gives back, and who loads first. No GPU is needed to see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.learner_actor import LearnerActor
from rlsys.config import LearnerSection
from rlsys.config.gpu_shares import may_share, start_in_order
from rlsys.errors import GradientError
from rlsys.learner.learner import Learner
from rlsys.utils import gpu_memory
from tests.unit.learner.test_policy import LENGTH, job, on_policy, policy_of

GIB = 2**30


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch's CUDA allocator, in order."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: calls.append(f"limit {share:g}"))
    return calls


def actor(base: Path, **section: object) -> LearnerActor:
    """With a policy that computes on the CPU, where the job says what it says of the GPU."""
    config = job(base)
    learner = LearnerSection.model_validate(section)
    made = LearnerActor(config.model_copy(update={"learner": learner}), 0)
    made.started = policy_of(base)
    return made


def test_after_all_that_computes_the_memory_that_torch_keeps_is_given_back(
    tiny_model: Callable[[bool], Path], asked: list[str]
) -> None:
    door = actor(tiny_model(True), num_gpus=0.4)
    batch = on_policy(door.policy, np.linspace(-1, 1, LENGTH).astype(np.float32))
    place = SimpleNamespace(step=1, substep=0, first=True, last=True, on_policy=True)
    for work in (door.probe, lambda: door.learn(batch, place), door.publish, door.state_files):
        asked.clear()
        work()
        assert asked == ["limit 0.4", "empty"]
    asked.clear()
    door.policy.learner.runs.forget_gradient(door.policy.run_id)
    with pytest.raises(GradientError), door._on_its_share():
        door.policy.learner.optim_step(door.policy.run_id, door.config.rl.optim.at(0, 1))
    assert asked == ["limit 0.4", "empty"]  # after an error too


@pytest.mark.parametrize("section", [{}, {"num_gpus": 1}], ids=["on the CPU", "a GPU of its own"])
def test_who_shares_no_gpu_keeps_its_memory(
    section: dict[str, object], tiny_model: Callable[[bool], Path], asked: list[str]
) -> None:
    door = actor(tiny_model(True), **section)
    door.publish()
    door.state_files()
    assert asked == []


def test_the_base_is_loaded_within_the_share_and_the_rest_given_back(
    tiny_model: Callable[[bool], Path], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    door = actor(tiny_model(True), num_gpus=0.5)
    learner = door.policy.learner

    def load(*arguments: object) -> Learner:
        asked.append("load")
        return learner

    monkeypatch.setattr(door, "_load", load)
    assert door.load("base", None) == learner.computing_dtype
    assert asked == ["limit 0.5", "load", "empty"]


@pytest.mark.parametrize(
    ("fraction", "wanted"),
    [(1.0, 10 + 4), (0.5, 12 - 6), (0.1, 0)],  # GiB: of 24, 10 are free, 10 reserved here, 6 of those allocated
)
def test_graphs_are_kept_in_what_this_process_may_still_allocate(
    fraction: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "mem_get_info": (10 * GIB, 24 * GIB),
        "memory_allocated": 6 * GIB,
        "memory_reserved": 10 * GIB,
        "get_per_process_memory_fraction": fraction,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    assert gpu_memory.unused_bytes() == wanted * GIB


@pytest.mark.parametrize(
    ("learner", "sampler", "shares"), [(0.5, 0.5, True), (1, 0.5, False), (0.5, 1, False), (0, 0.5, False)]
)
def test_on_a_gpu_that_both_may_be_on_the_learner_is_loaded_before_an_engine_starts(
    learner: float, sampler: float, shares: bool
) -> None:
    ranks = SimpleNamespace(num_workers=1, num_gpus=learner)
    engines = SimpleNamespace(num_workers=1, num_gpus=sampler)
    order: list[str] = []
    start_in_order(may_share(ranks, engines), lambda: order.append("learner"), lambda: order.append("engines"))
    assert order == (["learner", "engines"] if shares else ["engines", "learner"])
