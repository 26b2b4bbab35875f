"""Log-probabilities of target tokens, a chunk of rows at a time: (chunk, V) logits exist, (T, V) never do.

    p_t = log softmax(W h_t / temperature)[y_t],   dp_t / dh_t = (e(y_t) - softmax)_t W / temperature

p_t depends on h_t alone, so with a frozen W its gradient is one row of a (T, H) tensor, computed while the logits are
there: one product more, nothing to recompute. Where the output layer is trained (all weights, or an adapter on it) the
chunk is run again in the backward pass. Softmax and logarithm are in fp32 (float64 where the model is).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def token_logprobs(head: nn.Module, hidden_T: Tensor, targets_T: Tensor, temperature: float, chunk: int) -> Tensor:
    """(T,) nats of each target; hidden_T is (T, H), `head` maps it to logits."""
    if isinstance(head, nn.Linear) and not any(weight.requires_grad for weight in head.parameters()):
        wants_grad = hidden_T.requires_grad and torch.is_grad_enabled()
        return _frozen_head(hidden_T, head.weight, head.bias, targets_T, temperature, chunk, wants_grad)

    def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = _wide(head(hidden))
        logits = logits if temperature == 1.0 else logits / temperature
        return -nn.functional.cross_entropy(logits, targets, reduction="none")

    chunks = list(zip(hidden_T.split(chunk), targets_T.split(chunk), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.cat([of_chunk(*rows) for rows in chunks])
    again = partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*rows) for rows in chunks])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_T: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        chunk: int,
        wants_grad: bool,
    ) -> Tensor:
        rows_of_p, rows_of_grad = [], []
        for hidden, targets in zip(hidden_T.split(chunk), targets_T.split(chunk), strict=True):
            logp = torch.log_softmax(_wide(nn.functional.linear(hidden, weight, bias)).div_(temperature), -1)
            at_target = logp.gather(1, targets[:, None])
            rows_of_p.append(at_target[:, 0])
            if wants_grad:
                slope = logp.exp_().neg_().scatter_(1, targets[:, None], -at_target.expm1())  # e(y) - softmax
                rows_of_grad.append((slope.div_(temperature).to(weight.dtype) @ weight).to(hidden.dtype))
        if wants_grad:
            ctx.save_for_backward(torch.cat(rows_of_grad))
        return torch.cat(rows_of_p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope_T,) = ctx.saved_tensors
        return (grads[0][:, None] * slope_T).to(slope_T.dtype), None, None, None, None, None, None


_frozen_head: Callable[..., Tensor] = _FrozenHead.apply
