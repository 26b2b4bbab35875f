"""Returns per-token results in the container type of the datum's ``target_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlsys.types import Array, Datum, TensorData


def like(container: Any, values: Array) -> Any:
    """Convert `values` (N,) to the type of `container`: list, numpy array, torch tensor or TensorData."""
    if isinstance(container, TensorData):
        return TensorData(values)
    if isinstance(container, np.ndarray):
        return np.array(values)
    if hasattr(container, "detach"):
        import torch

        return torch.from_numpy(np.array(values))  # a copy: arrays from Ray's object store are read-only
    return values.tolist()


def outputs(data: Sequence[Datum], logprobs_T: Array) -> list[dict[str, Any]]:
    """Split `logprobs_T` (T,), the datums' values end to end, into one ``{"logprobs": (N,)}`` per datum."""
    ends = np.cumsum([datum.model_input.length for datum in data])
    return [
        {"logprobs": like(datum.loss_fn_inputs["target_tokens"], part)}
        for datum, part in zip(data, np.split(logprobs_T, ends[:-1]), strict=True)
    ]
