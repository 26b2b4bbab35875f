"""Each version of a run is published with the canary under the version before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlsys.errors import DivergedError
from rlsys.learner.learner import Learner
from rlsys.weight_sync.canary import Canary
from rlsys.weight_sync.publisher import AdapterPublisher
from rlsys.weight_sync.update import WeightUpdate
from tests.unit.tiny_learner import Models, make, with_run

TOKENS = np.arange(1, 33, dtype=np.int32)


def publisher_of(learner: Learner) -> AdapterPublisher:
    return AdapterPublisher(Canary(learner, "float32", TOKENS))


def published(publisher: AdapterPublisher, run_id: str = "run") -> WeightUpdate:
    return publisher.publish(run_id, "made step 3", "Lower the learning rate")


def change(learner: Learner, run_id: str, factor: float) -> None:
    with torch.no_grad():
        for weight in learner.runs[run_id].parameters.values():
            weight.mul_(factor)


def test_a_version_is_compared_with_the_one_published_before_and_the_first_with_the_base(tiny_model: Models) -> None:
    learner = with_run(make(tiny_model(True)))
    publisher = publisher_of(learner)
    base = learner.logprobs(None, TOKENS, np.array([0, len(TOKENS)]))[1:]
    first = published(publisher)
    assert np.array_equal(first.canary_previous, base) and not np.array_equal(first.canary_new, base)
    change(learner, "run", 0.5)
    second = published(publisher)
    assert np.array_equal(second.canary_previous, first.canary_new)
    assert not np.array_equal(second.canary_new, first.canary_new)
    publisher.reset("run")
    again = published(publisher)
    assert np.array_equal(again.canary_previous, base) and np.array_equal(again.canary_new, second.canary_new)


def test_runs_are_compared_with_their_own_versions(tiny_model: Models) -> None:
    learner = with_run(with_run(make(tiny_model(True))), run="other", seed=2)
    publisher = publisher_of(learner)
    first, other = published(publisher), published(publisher, "other")
    assert np.array_equal(other.canary_previous, first.canary_previous), "both are compared with the base"
    assert np.array_equal(published(publisher).canary_previous, first.canary_new)
    publisher.reset("run")
    assert np.array_equal(published(publisher, "other").canary_previous, other.canary_new)


def test_weights_without_finite_logprobs_are_refused_and_are_no_previous_version(tiny_model: Models) -> None:
    learner = with_run(make(tiny_model(True)))
    publisher = publisher_of(learner)
    first = published(publisher)
    good = {name: weight.detach().clone() for name, weight in learner.runs["run"].parameters.items()}
    change(learner, "run", float("nan"))
    with pytest.raises(DivergedError) as caught:
        published(publisher)
    assert str(caught.value) == (
        "run 'run' gives 31 of 31 canary tokens no finite log-probability; it made step 3. No sampler received this "
        "version. Lower the learning rate"
    )
    with torch.no_grad():
        for name, weight in learner.runs["run"].parameters.items():
            weight.copy_(0.5 * good[name])
    assert np.array_equal(published(publisher).canary_previous, first.canary_new)
