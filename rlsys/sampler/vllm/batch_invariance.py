"""Matrix products of few rows by the kernel of many, so that a completion's bits do not depend on its company.

Below 16 rows the float32 product on CPU takes other kernels, which round differently; from 16 on each row has the same
bits whatever the others are (measured; bfloat16 has no such bound). With this, what a seeded request draws does not
depend on when it came, which sampler got it, or who else was there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ROWS = 16

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # input, weight, bias


def filled(x: torch.Tensor) -> torch.Tensor:
    """x with rows of zeros up to the bound."""
    lacking = ROWS - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, lacking)) if lacking > 0 and x.dtype == torch.float32 else x


def batch_invariant_matmul(model: torch.nn.Module) -> None:
    """Fill the rows of every linear layer's input."""
    for module in model.modules():
        multiply: Multiply | None = getattr(module, "cpu_linear", None)  # what vLLM chose for this layer
        if multiply is not None:
            module.cpu_linear = _filling(multiply)


def _filling(multiply: Multiply) -> Any:  # a Multiply; torch declares modules' attributes as tensors and modules only
    def by_many(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return multiply(filled(x), weight, bias)[: x.shape[0]] if x.dim() == 2 else multiply(x, weight, bias)

    return by_many
