"""Per-token results in the user's own kind of container: that of the datum's ``target_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlsys.types import Array, Datum, TensorData


def like(container: Any, values: Array) -> Any:
    """`values` (N,) as list, numpy array, torch tensor or TensorData."""
    if isinstance(container, TensorData):
        return TensorData(values)
    if isinstance(container, np.ndarray):
        return np.array(values)
    if hasattr(container, "detach"):
        import torch

        return torch.from_numpy(np.array(values))  # a copy: what came through Ray is read-only
    return values.tolist()


def outputs(data: Sequence[Datum], logprobs_T: Array) -> list[dict[str, Any]]:
    """One ``{"logprobs": (N,)}`` per datum, whose values lie end to end in `logprobs_T`."""
    ends = np.cumsum([datum.model_input.length for datum in data])
    return [
        {"logprobs": like(datum.loss_fn_inputs["target_tokens"], part)}
        for datum, part in zip(data, np.split(logprobs_T, ends[:-1]), strict=True)
    ]
