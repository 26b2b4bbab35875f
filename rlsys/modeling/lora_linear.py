"""Frozen linear layer with a LoRA adapter, as one autograd function.

    y = x W' + s (x A') B'        dx = g W + s (g B) A,   dA = s (g B)' x,   dB = s g' (x A')

PEFT uses five operations. With a half-precision base and an fp32 adapter it casts the input of every layer to fp32, and
saves the copy for the backward pass. Here the adapter is cast instead, which is small. Saved are x and x A' (T, r).
Gradients of A and B are in the adapter's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from rlsys.modeling.autograd_context import AutogradContext


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y (..., out) from x (..., in), weight (out, in), a (r, in) and b (out, r). Weight and bias get no gradient."""
    return _adapted_linear(x, weight, bias, a, b, scale)


class _Context(AutogradContext, Protocol):
    scale: float


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        by_a = rows @ a.to(x.dtype).T
        y = linear(rows, weight, bias).addmm_(by_a, _scaled(b, scale, x.dtype).T)
        ctx.save_for_backward(rows, weight, a, b, by_a)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, by_a = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        by_b = grad @ _scaled(b, ctx.scale, grad.dtype)
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ weight).addmm_(by_b, a.to(grad.dtype)).view(*grads[0].shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            of_a = (by_b.T @ rows).to(a.dtype)
        if ctx.needs_input_grad[4]:
            of_b = (by_a.T @ grad).T.to(b.dtype).mul_(ctx.scale)  # on CPU twice as fast as grad.T @ by_a
        return of_x, None, None, of_a, of_b, None


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Scale `b` in the adapter's dtype, then cast."""
    return (b.detach() * scale).to(dtype)


_adapted_linear: Callable[..., Tensor] = _LoraLinear.apply
