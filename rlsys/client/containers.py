"""Returns per-token results in the container type of the datum's ``target_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from rlsys.types import Array, Datum, TensorData

if TYPE_CHECKING:
    import torch

Values: TypeAlias = "list[float] | Array | torch.Tensor | TensorData"


def like(container: object, values: Array) -> Values:
    """Convert `values` (N,) to the type of `container`: list, numpy array, torch tensor or TensorData."""
    if isinstance(container, TensorData):
        return TensorData(values)
    if isinstance(container, np.ndarray):
        return np.array(values)
    if hasattr(container, "detach"):
        import torch

        return torch.from_numpy(np.array(values))  # a copy: arrays from Ray's object store are read-only
    return values.tolist()


def by_datum(data: Sequence[Datum], logprobs_T: Array) -> list[Array]:
    """Split `logprobs_T` (T,), the datums' values end to end, into one (N,) per datum."""
    ends = np.cumsum([datum.model_input.length for datum in data])
    return np.split(logprobs_T, ends[:-1])


def outputs(data: Sequence[Datum], logprobs_T: Array) -> list[dict[str, Values]]:
    """One ``{"logprobs": (N,)}`` per datum, in its container."""
    return [
        {"logprobs": like(datum.loss_fn_inputs["target_tokens"], part)}
        for datum, part in zip(data, by_datum(data, logprobs_T), strict=True)
    ]
