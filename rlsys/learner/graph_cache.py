"""Autograd graphs that a custom loss keeps between its forward and backward passes.

A custom loss needs the log-probabilities of all micro-batches before any gradient. Each graph that is kept saves a
second forward pass and costs the tensors that autograd saves for its micro-batch, measured on the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class GraphCache:
    """Keeps autograd graphs of at most `allowed` bytes in total.

    A graph is kept only if as many bytes again stay free, for a graph that is recomputed in the backward pass.
    `resident` tensors, the model's weights, are not counted.
    """

    def __init__(self, allowed: int, resident: Iterable[Tensor]) -> None:
        self._left = allowed
        self._resident = {tensor.untyped_storage().data_ptr() for tensor in resident} if allowed else set()
        self._per_token = 0.0

    def forward(self, work: Callable[[], Tensor], tokens: int) -> Tensor:
        """Result of `work` on a micro-batch of `tokens` tokens: with its graph if that fits, else without."""
        if self._left <= 0 or 2 * self._per_token * tokens > self._left:
            with torch.no_grad():
                return work()
        sizes: dict[int, int] = {}

        def record_size(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record_size, lambda tensor: tensor):
            output = work()
        size = sum(nbytes for address, nbytes in sizes.items() if address not in self._resident)
        self._per_token = max(self._per_token, size / tokens)
        if 2 * size > self._left:
            return output.detach()
        self._left -= size
        return output
