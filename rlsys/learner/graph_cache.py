"""Graphs that a loss over several micro-batches keeps, so that they need not run forward again.

Such a loss needs all log-probabilities before any gradient. Each graph that is still there then saves a forward pass,
and costs what autograd keeps of its micro-batch; how much that is shows on the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class GraphCache:
    """At most `allowed` bytes of them at once, the one counted that has to run again meanwhile.

    What `resident` tensors hold is there anyway: the model's weights.
    """

    def __init__(self, allowed: int, resident: Iterable[Tensor]) -> None:
        self._left = allowed
        self._resident = {tensor.untyped_storage().data_ptr() for tensor in resident} if allowed else set()
        self._per_token = 0.0

    def forward(self, work: Callable[[], Tensor], tokens: int) -> Tensor:
        """What `work` gives of a micro-batch of so many tokens: with its graph where that fits, else without."""
        if self._left <= 0 or 2 * self._per_token * tokens > self._left:
            with torch.no_grad():
                return work()
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = work()
        size = sum(nbytes for address, nbytes in sizes.items() if address not in self._resident)
        self._per_token = max(self._per_token, size / tokens)
        if 2 * size > self._left:
            return found.detach()
        self._left -= size
        return found
