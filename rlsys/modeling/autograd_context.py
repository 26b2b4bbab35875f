"""Type of the context that torch hands to an autograd function.

torch creates its class at run time. A function that keeps values beside tensors extends this Protocol by them.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AutogradContext(Protocol):
    needs_input_grad: tuple[bool, ...]  # one per argument of forward

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What `save_for_backward` was given."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass."""

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Name the outputs that have no gradient."""
