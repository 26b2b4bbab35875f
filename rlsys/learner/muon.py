"""Muon for 2-D weights (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982), with products in float32.

torch.optim.Muon multiplies in bfloat16. Where a CPU has no instructions for bfloat16, such a product is tens of times
slower than one in float32, and the optimizer took more time than the rest of a training step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # the value of Jordan et al.; AdamParams has no name for it
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.'s quintic, steep at zero
EPS = 1e-7
RMS_OF_ADAMW = 0.2  # Liu et al., section 2.2: with it AdamW's learning rate fits


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, whose matrix is made nearly orthogonal, with decoupled weight decay."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        super().__init__(weights, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none of rlsys's steps has one
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                kept = self.state[weight]
                momentum = kept.setdefault("momentum_buffer", torch.zeros_like(weight.grad))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonal(weight.grad.lerp(momentum, MOMENTUM))
                weight.mul_(1 - rate * decay)
                weight.add_(update, alpha=-rate * RMS_OF_ADAMW * math.sqrt(max(weight.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Return U p(p(...p(S))) V^T of the (m, n) matrix U S V^T scaled to a Frobenius norm of 1, with
    p(s) = a s + b s^3 + c s^5: singular values that are not tiny come out between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix
    x = x.T if tall else x  # so that the square matrix is the small one
    x = x / x.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
