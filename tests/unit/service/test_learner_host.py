"""Snapshots of a deployment's learner: what samplers get, and what they never get."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlsys import losses
from rlsys.client.backend import SnapshotHandle
from rlsys.client.config import HostSpec
from rlsys.client.requests import Drop, Request, Skip, TakeSnapshot
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.errors import DivergedError
from rlsys.service.learner_host import TrainingHost
from rlsys.types import AdamParams
from rlsys.weight_sync.update import WeightUpdate
from tests.unit.tiny_learner import Models, assert_same_bits, draw, state

LORA = LoraSection(rank=4, alpha=8.0)


@pytest.fixture
def host(tiny_model: Models, tmp_path: Path) -> TrainingHost:
    base = tiny_model(True)
    spec = HostSpec(
        base_model="tiny",
        model=ModelSection(path=str(base), max_length=64),
        learner=LearnerSection(token_budget=64),
        max_lora_rank=16,
        lora_alpha=8.0,
        serves_unembed=True,
        checkpoints=str(tmp_path),
        detached=None,
    )
    return TrainingHost(base, spec)


def step(host: TrainingHost, model_id: str, learning_rate: float) -> None:
    host.learner.forward_backward(model_id, draw(), losses.resolve("cross_entropy"))
    host.learner.optim_step(model_id, AdamParams(learning_rate))


def update(handle: SnapshotHandle) -> WeightUpdate:
    assert isinstance(handle.ref, WeightUpdate)
    return handle.ref


def test_snapshots_of_one_run_are_compared_with_each_other_and_opened_ones_with_the_base(host: TrainingHost) -> None:
    for model_id in ("a", "b"):
        host.create(model_id, LORA, seed=1)
    first = host.do("a", TakeSnapshot())
    step(host, "a", 1e-2)
    second, other = host.do("a", TakeSnapshot("saved")), host.do("b", TakeSnapshot())
    assert second.path is not None
    assert np.array_equal(update(second).canary_previous, update(first).canary_new)
    assert np.array_equal(update(other).canary_previous, update(first).canary_previous)
    for _ in range(2):
        opened = host.open(second.path)
        assert np.array_equal(update(opened).canary_previous, update(first).canary_previous)
        assert update(opened).snapshot.digest == update(second).snapshot.digest
    assert host.learner.runs.ids == ["a", "b"]


def test_weights_that_give_no_finite_logprobs_become_no_snapshot(host: TrainingHost) -> None:
    host.create("a", LORA, seed=1)
    step(host, "a", 1e30)
    with pytest.raises(DivergedError, match=r"run 'a' gives .*it is at optimizer step 1.*AdamParams\.learning"):
        host.do("a", TakeSnapshot())


def test_a_dropped_run_is_gone_and_a_skipped_call_changes_nothing(host: TrainingHost) -> None:
    for model_id in ("a", "b"):
        host.create(model_id, LORA, seed=1)
    step(host, "a", 1e-2)
    before = state(host.learner, "a")
    assert host.do("a", Skip()) is None and host.do("b", Drop()) is None
    assert host.learner.runs.ids == ["a"]
    assert_same_bits(state(host.learner, "a"), before)


def test_a_request_that_the_learner_does_not_know_is_refused_by_its_name(host: TrainingHost) -> None:
    class Merge(Request[None]):
        op = "merge"

    with pytest.raises(TypeError, match="Merge"):
        host.do("a", Merge())
