"""A loss of the user's own has one gradient, whichever way it is computed, and what is wrong with it is said."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys import losses
from rlsys.datums import collate
from rlsys.errors import DatumError, LossError, MissingInputError
from rlsys.learner.custom_loss import (
    PASSES,
    collate_custom,
    compute_custom_loss,
    result_metrics,
    surrogate_data,
    surrogate_weights,
)
from rlsys.learner.graph_cache import GraphCache
from rlsys.learner.learner import Learner
from rlsys.types import AdamParams, Datum, ModelInput, TensorData
from tests.unit.tiny_learner import (
    BOUNDS,
    Models,
    assert_close,
    assert_same_bits,
    datums_of,
    draw,
    gradients,
    lend,
    make,
    preference,
    state,
    weights,
    with_run,
)

WHOLE, KEPT, AGAIN = (1000, None), (25, None), (25, 0.0)  # token budget and learner.custom_graph_gb; 93 positions
IDS = ["one micro-batch", "kept graphs", "forward again"]
WAYS = pytest.mark.parametrize("way", [WHOLE, KEPT, AGAIN], ids=IDS)
Way = tuple[int, float | None]
SIZES = {"vocab_size": 64, "max_length": 128}


def cross_entropy(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    pairs = zip(data, logprobs, strict=True)
    loss = -sum((torch.as_tensor(datum.loss_fn_inputs["weights"]).to(logp) * logp).sum() for datum, logp in pairs)
    return torch.as_tensor(loss), {"tokens:sum": sum(map(len, logprobs))}


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_one_pass_and_two_have_the_same_gradient_loss_and_logprobs(
    tiny_model: Models, dtype: torch.dtype, bound: float
) -> None:
    batch = draw()
    found = []
    for way, passes in ((WHOLE, 1.0), (KEPT, 1.0), (AGAIN, 2.0)):
        learner = with_run(lend(tiny_model(True), dtype, *way))
        result = learner.forward_backward_custom("run", batch, datums_of(batch), preference, temperature=0.9)
        assert result.metrics == {"loss:sum": result.loss_sum, PASSES: passes}
        plain = learner.forward("run", batch, losses.resolve("cross_entropy"), temperature=0.9)
        assert np.array_equal(result.logprobs, plain.logprobs)
        found.append((gradients(learner), result))
    for gradient, result in found[1:]:
        assert_close(gradient, found[0][0], bound)
        assert result.loss_sum == pytest.approx(found[0][1].loss_sum, rel=bound)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_more_graphs_fit_the_fewer_forward_passes_and_no_bit_differs(
    tiny_model: Models, checkpointing: bool
) -> None:
    batch = draw(16)
    learner = with_run(lend(tiny_model(True), budget=25, gradient_checkpointing=checkpointing))
    micros = len(learner._forward.micro_batches(batch))
    moved, found = [], []
    for kib in (0, 32, 64, 256, 512, 2**30):
        learner._forward.section = learner._forward.section.model_copy(update={"custom_graph_gb": kib / 2**20})
        before = learner.progress()
        result = learner.forward_backward_custom("run", batch, datums_of(batch), preference)
        moved.append((learner.progress() - before - micros) // 2)  # forward passes
        assert result.metrics[PASSES] == (1.0 if moved[-1] == micros else 2.0)
        found.append((gradients(learner), result.logprobs))
        learner.runs.forget_gradient("run")
    assert moved == sorted(moved, reverse=True) and len(set(moved)) >= 4
    assert moved[0] == 2 * micros - 1 and moved[-1] == micros
    for gradient, logp in found[1:]:
        assert np.array_equal(logp, found[0][1])
        assert all(torch.equal(gradient[name], found[0][0][name]) for name in gradient)


def test_a_graph_is_kept_while_one_more_as_large_would_fit() -> None:
    weight = torch.ones(1000, requires_grad=True)
    size = 4 * 1000

    def work() -> Tensor:
        return (weight * 2).exp()  # saves its result, and nothing of what multiplies a number

    def work_on(resident: Tensor) -> Tensor:
        return (weight * resident).exp()  # saves both

    assert not GraphCache(0, []).forward(work, 10).requires_grad
    assert not GraphCache(2 * size - 1, []).forward(work, 10).requires_grad
    graphs = GraphCache(4 * size, [])
    assert [graphs.forward(work, 10).requires_grad for _ in range(4)] == [True, True, True, False]
    assert not graphs.forward(work, 1).requires_grad  # what is left is less than two of a tenth would take
    constant = torch.ones(1000)
    assert not GraphCache(2 * size, []).forward(lambda: work_on(constant), 10).requires_grad
    assert GraphCache(2 * size, [constant]).forward(lambda: work_on(constant), 10).requires_grad


@WAYS
def test_the_callers_way_has_the_gradient_of_the_shipped_one(tiny_model: Models, way: Way) -> None:
    """forward, autograd on log-probabilities, surrogate backward: what a remote client does, over float32."""
    batch = draw()
    data = datums_of(batch)
    shipped = with_run(lend(tiny_model(True), torch.float32, *way))
    there = shipped.forward_backward_custom("run", batch, data, preference)
    learner = with_run(lend(tiny_model(True), torch.float32, *way))
    logp_T = learner.forward("run", batch, losses.resolve("cross_entropy")).logprobs
    surrogate = surrogate_weights(data, np.split(logp_T, batch.offsets[1:-1]), preference)
    again = collate(surrogate_data(data, surrogate.weights), losses.resolve("cross_entropy"), **SIZES)
    learner.forward_backward("run", again, losses.resolve("cross_entropy"))
    assert_close(gradients(learner), gradients(shipped), 1e-5)
    assert surrogate.loss == pytest.approx(there.loss_sum, rel=1e-6)
    assert surrogate.weights[0].dtype == np.float32


@WAYS
def test_a_built_in_loss_written_by_hand_is_the_built_in_loss(tiny_model: Models, way: Way) -> None:
    batch = draw()
    ours, theirs = (with_run(lend(tiny_model(True), torch.float64, *way)) for _ in range(2))
    wanted = ours.forward_backward("run", batch, losses.resolve("cross_entropy"))
    found = theirs.forward_backward_custom("run", batch, datums_of(batch), cross_entropy)
    assert_close(gradients(theirs), gradients(ours), 1e-10)
    assert found.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-12)
    assert found.metrics["tokens:sum"] == len(batch.tokens)


def test_a_custom_loss_adds_to_what_has_accumulated(tiny_model: Models) -> None:
    batch, loss_fn = draw(), losses.resolve("cross_entropy")
    mixed, plain = (with_run(lend(tiny_model(True), torch.float64)) for _ in range(2))
    mixed.forward_backward("run", batch, loss_fn)
    mixed.forward_backward_custom("run", batch, datums_of(batch), cross_entropy)
    plain.forward_backward("run", batch, loss_fn)
    plain.forward_backward("run", batch, loss_fn)
    assert_close(gradients(mixed), gradients(plain), 1e-10)
    assert mixed.optim_step("run", AdamParams())["grad_norm"] > 0


def test_the_function_sees_leaves_on_the_cpu_in_the_datums_order_and_the_datums_themselves(tiny_model: Models) -> None:
    batch, seen = draw(), []
    data = datums_of(batch)

    def look(given: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        assert given is data
        seen.extend(logprobs)
        return torch.cat(logprobs).sum(), {}

    learner = with_run(lend(tiny_model(True), budget=25))
    result = learner.forward_backward_custom("run", batch, data, look)
    assert [len(logp) for logp in seen] == batch.lengths.tolist()
    assert all(logp.is_leaf and logp.requires_grad and logp.device.type == "cpu" for logp in seen)
    assert np.array_equal(torch.cat(seen).detach().numpy(), result.logprobs)


def raising(data: Any, logprobs: list[Tensor]) -> Any:
    raise KeyError("reference")


def returns(value: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def returned(data: Any, logprobs: list[Tensor]) -> Any:
        return value(torch.cat(logprobs).sum())

    return returned


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raising, r"custom loss 'raising' raised KeyError: 'reference' \(.*test_custom_loss.py:\d+ in raising\)"),
    "no tuple": (returns(lambda s: s), r"returned a tensor of shape \(\).*; wanted a tuple \(loss, metrics\)"),
    "nothing": (returns(lambda s: None), "returned None; wanted a tuple"),
    "three": (returns(lambda s: (s, {}, 1)), "returned a tuple of 3; wanted a tuple"),
    "a number": (returns(lambda s: (1.0, {})), "its loss is a float; wanted a scalar tensor"),
    "a vector": (returns(lambda s: (s * torch.ones(3), {})), r"a tensor of shape \(3,\).*; wanted a scalar tensor"),
    "an integer": (returns(lambda s: (s.long(), {})), "dtype torch.int64; wanted a scalar tensor"),
    "detached": (returns(lambda s: (s.detach(), {})), "its loss has no gradient"),
    "of something else": (
        returns(lambda s: (torch.ones((), requires_grad=True) * 2, {})),
        "does not depend on the log-probabilities",
    ),
    "nan": (returns(lambda s: (s * math.nan, {})), "its loss is nan; wanted a finite one"),
    "infinite slope": (
        returns(lambda s: ((s - s.detach()).abs().sqrt(), {})),
        "datum 0: its gradient is nan at position 0, where the log-probability is -",
    ),
    "no metrics": (returns(lambda s: (s, None)), "its metrics are None; wanted a dict"),
    "a text": (returns(lambda s: (s, {"accuracy": "high"})), r"metrics\['accuracy'\] is a str; wanted a number"),
    "a digit as text": (returns(lambda s: (s, {"accuracy": "1"})), r"metrics\['accuracy'\] is a str; wanted a number"),
    "many": (returns(lambda s: (s, {"a": torch.ones(2)})), r"metrics\['a'\] is a tensor of shape \(2,\)"),
    "a name that is none": (returns(lambda s: (s, {1: 2.0})), "found the name 1; wanted a string"),
    "our name": (returns(lambda s: (s, {PASSES: 1.0})), "are set by rlsys"),
    "another loss": (returns(lambda s: (s, {"loss:sum": 7.0})), "are set by rlsys"),
}


@pytest.fixture(scope="module", params=[WHOLE, KEPT, AGAIN], ids=IDS)
def with_gradient(request: pytest.FixtureRequest, tiny_model: Models) -> Learner:
    """One for all wrong functions, since each leaves every bit."""
    learner = with_run(make(tiny_model(True), torch.float32, *request.param))
    learner.forward_backward("run", draw(), losses.resolve("cross_entropy"))
    return learner


@pytest.mark.parametrize(("fn", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_function_is_refused_with_its_name_and_leaves_every_bit(
    with_gradient: Learner, fn: Callable[..., Any], message: str
) -> None:
    learner, batch = with_gradient, draw()
    before = state(learner, "run")
    with pytest.raises(LossError, match=message) as raised:
        learner.forward_backward_custom("run", batch, datums_of(batch), fn)
    assert "custom loss '" in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert_same_bits(state(learner, "run"), before)


def test_a_failure_on_a_run_without_a_gradient_leaves_none(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True)))
    with pytest.raises(LossError):
        learner.forward_backward_custom("run", draw(), datums_of(draw()), raising)
    assert not learner.runs.has_gradient("run")
    assert all(weight.grad is None for weight in learner.runs["run"].parameters.values())
    assert weights(learner)


def test_metrics_come_back_as_numbers_under_the_users_names() -> None:
    values: dict[str, Any] = {
        "plain": 1,
        "numpy": np.float32(0.5),
        "tensor": torch.tensor(2.0),
        "flag": True,
        "nan": math.nan,
    }
    found = compute_custom_loss(lambda data, p: (p[0].sum(), values), [], [torch.zeros(2)])
    assert {key: type(value) for key, value in found.metrics.items()} == dict.fromkeys(values, float)
    assert [found.metrics[key] for key in ("plain", "numpy", "tensor", "flag")] == [1.0, 0.5, 2.0, 1.0]
    same = compute_custom_loss(lambda data, p: (p[0].sum() + 3, {"loss:sum": 3.0}), [], [torch.zeros(2)])
    assert result_metrics(same.loss, same.metrics, 1) == {"loss:sum": 3.0, PASSES: 1.0}


def test_a_datum_that_the_loss_ignores_has_gradient_zero() -> None:
    found = compute_custom_loss(
        lambda data, p: ((p[0] * torch.tensor([1.0, 2.0])).sum(), {}), [], [torch.ones(2), torch.ones(3)]
    )
    assert [slope.tolist() for slope in found.slopes] == [[1.0, 2.0], [0.0, 0.0, 0.0]]
    given: list[Any] = [[-1.0, -2.0], TensorData([-1.0])]
    surrogate = surrogate_weights([], given, lambda data, p: ((p[0] ** 2).sum(), {}))
    assert [weight.tolist() for weight in surrogate.weights] == [[2.0, 4.0], [0.0]]  # -dC/dp


def test_only_target_tokens_are_read() -> None:
    made = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "reference": [5.0, 6.0], "weights": [0, 1, 1]})
    batch = collate_custom([made, made], **SIZES)
    assert batch.targets.tolist() == [2, 3, 2, 3]
    assert {key: column.tolist() for key, column in batch.columns.items()} == {"weights": [1.0] * 4}
    with pytest.raises(MissingInputError, match=r"datum 1: loss_fn_inputs\['target_tokens'\] is missing"):
        collate_custom([made, Datum(ModelInput.from_ints([1]), {})], **SIZES)
    with pytest.raises(DatumError, match="datum 0: found a dict; wanted a Datum"):
        collate_custom([{}], **SIZES)  # type: ignore[list-item]
