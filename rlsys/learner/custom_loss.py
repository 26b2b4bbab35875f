"""A user's own loss on the log-probabilities of several datums at once.

C is any differentiable function of the log-probabilities p. The function gets p as leaves, so the backward pass through
the model needs only dC/dp. Two ways give the same gradient (chain rule):

    one pass     the model's graph is kept (rlsys/learner/graph_cache.py), and dC/dp is sent back through it
    two passes   p without a graph; then cross_entropy with weights w = -dC/dp, whose gradient is that of sum -w p

Two passes fit any batch in micro-batches, and the user's code need not run on the learner's node.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlsys.datums import DatumBatch, collate
from rlsys.errors import LossError
from rlsys.losses import Loss
from rlsys.types import Array, Datum, TensorData, to_array

Given = TypeVar("Given")
CustomLoss = Callable[[Sequence[Datum], list[Tensor]], tuple[Tensor, Mapping[str, float]]]

LOSS = "loss:sum"
PASSES = "custom_passes:unique"  # 2: at least one micro-batch ran forward twice


@dataclass(frozen=True, slots=True)
class CustomLossValue:
    """C, the user's metrics, and dC/dp per datum in its length, dtype and order."""

    loss: float
    metrics: dict[str, float]
    slopes: list[Tensor]


@dataclass(frozen=True, slots=True)
class Surrogate:
    """``weights[d]`` is (N_d,) float32: cross_entropy with them has the gradient of the custom loss, not its value."""

    loss: float
    metrics: dict[str, float]
    weights: list[Array]


def collate_custom(data: Sequence[Datum], *, vocab_size: int, max_length: int) -> DatumBatch:
    """The datums as one batch. Only target_tokens are read; all other inputs are for the function."""
    bare = [_only_targets(datum) for datum in data]
    return collate(bare, Loss("custom", frozenset()), vocab_size=vocab_size, max_length=max_length)


def compute_custom_loss(fn: CustomLoss, data: Sequence[Datum], logprobs: Sequence[Tensor]) -> CustomLossValue:
    """Call `fn` on leaves with the values of `logprobs`.

    Raises:
        LossError: `fn` raised, or did not return a finite scalar that depends on the log-probabilities, and metrics
            that are numbers.
    """
    leaves = [logp.detach().cpu().requires_grad_() for logp in logprobs]
    name = f"custom loss {getattr(fn, '__qualname__', type(fn).__name__)!r}"
    with torch.enable_grad():
        try:
            returned = fn(data, list(leaves))
        except Exception as error:  # the user's code may raise anything
            raise LossError(f"{name} raised {_format_value(error)}") from error
        loss, metrics = _checked(name, returned)
        try:
            found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        except RuntimeError as error:
            raise LossError(f"{name}: its loss cannot be differentiated: {error}") from error
    if all(slope is None for slope in found):
        raise LossError(f"{name}: its loss does not depend on the log-probabilities; wanted one computed from them")
    slopes = [torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, found, strict=True)]
    for d, slope in enumerate(slopes):
        if not slope.isfinite().all():
            at = int((~slope.isfinite()).nonzero()[0])
            raise LossError(
                f"{name}: datum {d}: its gradient is {slope[at]:g} at position {at}, where the log-probability is "
                f"{leaves[d][at]:g}; wanted a finite one"
            )
    return CustomLossValue(float(loss.detach()), metrics, slopes)


def surrogate_weights(data: Sequence[Datum], logprobs: Sequence[TensorData | Array], fn: CustomLoss) -> Surrogate:
    """Weights for a caller's cross_entropy, from a forward's log-probabilities. Errors as `compute_custom_loss`."""
    tensors = [torch.from_numpy(np.array(to_array(logp), np.float32)) for logp in logprobs]
    found = compute_custom_loss(fn, data, tensors)
    return Surrogate(found.loss, found.metrics, [-slope.numpy() for slope in found.slopes])


def surrogate_data(data: Sequence[Datum], weights: Sequence[Array]) -> list[Datum]:
    """The datums as cross_entropy takes them, with these weights."""
    return [
        Datum(datum.model_input, {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": of_datum})
        for datum, of_datum in zip(data, weights, strict=True)
    ]


def result_metrics(loss: float, metrics: Mapping[str, float], passes: int) -> dict[str, float]:
    """The user's metrics, and the two that rlsys adds."""
    return {**metrics, LOSS: loss, PASSES: float(passes)}


def _only_targets(datum: Given) -> Given | Datum:
    if not isinstance(datum, Datum):
        return datum  # collate refuses it and names its index
    inputs = datum.loss_fn_inputs
    return Datum(datum.model_input, {key: inputs[key] for key in inputs if key == "target_tokens"})


def _checked(name: str, returned: object) -> tuple[Tensor, dict[str, float]]:
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise LossError(f"{name}: returned {_kind(returned)}; wanted a tuple (loss, metrics)")
    loss, metrics = returned
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise LossError(f"{name}: its loss is {_kind(loss)}; wanted a scalar tensor: sum or average it")
    if not loss.requires_grad:
        raise LossError(
            f"{name}: its loss has no gradient; wanted one computed from the log-probabilities without detach, item or "
            "torch.no_grad"
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise LossError(f"{name}: its loss is {value}; wanted a finite one")
    if not isinstance(metrics, Mapping):
        raise LossError(f"{name}: its metrics are {_kind(metrics)}; wanted a dict of names and numbers")
    numbers = {key: _number(name, key, value) for key, value in metrics.items()}
    if PASSES in numbers or not math.isclose(numbers.get(LOSS, value), value, rel_tol=1e-5):
        raise LossError(f"{name}: {LOSS!r} and {PASSES!r} are set by rlsys; wanted other names for its metrics")
    return loss, numbers


def _number(name: str, key: object, value: Any) -> float:  # Any: float() raises TypeError for what it cannot convert
    if not isinstance(key, str):
        raise LossError(f"{name}: metrics: found the name {key!r}; wanted a string")
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):  # torch says RuntimeError for a tensor of several values
        raise LossError(f"{name}: metrics[{key!r}] is {_kind(value)}; wanted a number") from None


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return "None" if value is None else f"a {type(value).__name__}{size}"


def _format_value(error: Exception) -> str:
    """Type, text and place: the traceback does not leave an actor."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})"
