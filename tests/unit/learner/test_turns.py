"""Passes that pause at micro-batch borders, with other runs' work in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rlsys import losses
from rlsys.config import LoraSection
from rlsys.datums import DatumBatch
from rlsys.learner.learner import Learner
from rlsys.learner.turns import Turns, finish
from rlsys.types import AdamParams, BatchResult
from tests.unit.tiny_learner import (
    ALL_TARGETS,
    Models,
    assert_same_bits,
    datums_of,
    draw,
    gradients,
    lend,
    preference,
    state,
    with_run,
)

BUDGET, DATUMS = 24, 6  # three micro-batches or more
KINDS = ["importance_sampling", "ppo", "gspo", "forward", "custom in one pass", "custom in two passes"]
Begin = Callable[[Learner, str, DatumBatch], Turns[BatchResult]]


def learner_of(path: Path, kind: str) -> Learner:
    return lend(path, budget=BUDGET, custom_graph_gb=0.0 if kind.endswith("two passes") else 1.0)


def begin(learner: Learner, run: str, batch: DatumBatch, kind: str) -> Turns[BatchResult]:
    if kind.startswith("custom"):
        return learner.forward_backward_custom_in_turns(run, batch, datums_of(batch), preference)
    if kind == "forward":
        return learner.forward_in_turns(run, batch, losses.resolve("cross_entropy"))
    return learner.forward_backward_in_turns(run, batch, losses.resolve(kind), temperature=0.9)


def disturbed(turns: Turns[BatchResult], between: Iterator[object]) -> BatchResult:
    """The pass, with something else after each of its turns."""
    count = 0
    while True:
        try:
            next(turns)
        except StopIteration as end:
            assert count > 2, "the pass had hardly a pause"
            result: BatchResult = end.value
            return result
        count += 1
        next(between)


def others(learner: Learner) -> Iterator[object]:
    """Work of all kinds for other runs, one piece at a time."""
    loss, seed = losses.resolve("cross_entropy"), 0
    while True:
        seed += 1
        yield with_run(learner, LoraSection(rank=2, alpha=3.0, train_mlp=False), run=f"other {seed}", seed=seed)
        yield learner.forward_backward(f"other {seed}", draw(datums=2, seed=seed), loss)
        yield learner.optim_step(f"other {seed}", AdamParams(1e-1))
        yield learner.forward(f"other {seed}", draw(datums=2, seed=seed), loss)
        yield learner.logprobs(None, draw().tokens[:9], np.array([0, 9]))
        yield learner.probe(f"other {seed}", "float32", draw().tokens[:9])
        learner.runs.drop(f"other {seed}")


def assert_same_result(found: BatchResult, wanted: BatchResult) -> None:
    assert found.loss_sum == wanted.loss_sum and found.metrics == wanted.metrics
    assert np.array_equal(found.logprobs, wanted.logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_among_passes_and_steps_of_other_runs_has_the_bits_of_an_undisturbed_one(
    tiny_model: Models, kind: str
) -> None:
    alone, among = (with_run(learner_of(tiny_model(True), kind), ALL_TARGETS) for _ in range(2))
    between = others(among)
    for seed in range(2):
        for part in (seed, seed + 10):
            batch = draw(DATUMS, seed=part)
            found = disturbed(begin(among, "run", batch, kind), between)
            assert_same_result(found, finish(begin(alone, "run", batch, kind)))
        if kind != "forward":
            assert_same_bits(gradients(among), gradients(alone))
            assert among.optim_step("run", AdamParams(1e-2)) == alone.optim_step("run", AdamParams(1e-2))
        assert_same_bits(state(among, "run"), state(alone, "run"))


@pytest.mark.parametrize("kind", KINDS)
def test_passes_of_several_runs_turn_by_turn_end_as_each_alone(tiny_model: Models, kind: str) -> None:
    runs = ("a", "b", "c")
    among = learner_of(tiny_model(True), kind)
    for seed, run in enumerate(runs):
        with_run(among, ALL_TARGETS, run=run, seed=seed)
    passes = {run: begin(among, run, draw(DATUMS, seed=seed), kind) for seed, run in enumerate(runs)}
    results: dict[str, BatchResult] = {}
    while passes:
        for run, turns in list(passes.items()):
            try:
                next(turns)
            except StopIteration as end:
                results[run] = end.value
                del passes[run]
    for seed, run in enumerate(runs):
        alone = with_run(learner_of(tiny_model(True), kind), ALL_TARGETS, run=run, seed=seed)
        assert_same_result(results[run], finish(begin(alone, run, draw(DATUMS, seed=seed), kind)))
        assert_same_bits(state(among, run), state(alone, run))


@pytest.mark.parametrize("turns_taken", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_is_closed_halfway_leaves_every_bit_of_all_runs(
    tiny_model: Models, kind: str, turns_taken: int
) -> None:
    learner = with_run(with_run(learner_of(tiny_model(True), kind)), run="other", seed=2)
    for run in ("run", "other"):
        learner.forward_backward(run, draw(), losses.resolve("ppo"))
    before = [state(learner, run) for run in ("run", "other")]
    abandoned = begin(learner, "run", draw(datums=20, seed=7), kind)
    for _ in range(turns_taken):
        next(abandoned)
    abandoned.close()
    for run, wanted in zip(("run", "other"), before, strict=True):
        assert_same_bits(state(learner, run), wanted)


def test_a_failure_halfway_leaves_the_runs_gradient_and_the_half_pass_of_another(tiny_model: Models) -> None:
    path, loss = tiny_model(True), "importance_sampling"
    learner = with_run(with_run(learner_of(path, loss), run="good", seed=1), run="bad", seed=2)
    learner.forward_backward("bad", draw(), losses.resolve(loss))
    before = gradients(learner, "bad")
    bad = draw(seed=5)
    bad.tokens[bad.offsets[int(bad.lengths.argmin())]] = 64  # out of the vocabulary, in the last micro-batch
    good, failing = begin(learner, "good", draw(seed=3), loss), begin(learner, "bad", bad, loss)
    next(good), next(failing), next(good)
    with pytest.raises(IndexError):
        finish(failing)
    result = finish(good)
    assert_same_bits(gradients(learner, "bad"), before)
    alone = with_run(learner_of(path, loss), run="good", seed=1)
    assert_same_result(result, finish(begin(alone, "good", draw(seed=3), loss)))
    assert_same_bits(state(learner, "good"), state(alone, "good"))


def test_turns_tell_the_tokens_of_their_micro_batches(tiny_model: Models) -> None:
    learner, batch = with_run(learner_of(tiny_model(True), "ppo")), draw()
    tokens = list(begin(learner, "run", batch, "ppo"))
    assert sum(tokens) == len(batch.tokens) and max(tokens) <= BUDGET
