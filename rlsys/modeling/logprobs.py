"""Log-probabilities of target tokens, computed in chunks of rows, so that only a part of the (T, V) logits exists.

    p_t = log softmax(f(W h_t) / temperature)[y_t],   dp_t / dh_t = ((e(y_t) - softmax)_t f'(W h_t)) W / temperature

f is the logit transform of some models: a scale, f(z) = s z, or a soft cap, f(z) = c tanh(z / c). It rounds to the
model's dtype after each operation, as transformers and vLLM do.

p_t depends only on h_t. So with a frozen W the gradient is one row of a (T, H) tensor, which is computed in the forward
pass while the chunk's logits exist. This costs one more matrix product; recomputing the chunk in the backward pass
would cost two. If the output layer is trained (all weights, or an adapter on it), the chunk is recomputed. Softmax and
logarithm are computed in fp32 (in float64 for a float64 model). The optional entropy is -sum softmax log softmax of the
same chunk, in nats, without a gradient.

A chunk has as many rows as fit in CHUNK_BYTES of logits, so memory does not depend on T or V. On CPU the softmax is
computed in blocks that fit in the cache, and overwrites the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlsys.modeling.autograd_context import AutogradContext

CHUNK_BYTES = 64 * 2**20  # of logits in the model's dtype; see docs/performance.md
BLOCK = 262_144  # values per block and CPU thread; larger blocks need fewer thread synchronizations, see rms_norm.py


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """f of the module's docstring: a scale or a soft cap, at most one of them."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, logits: Tensor) -> Tensor:
        """Transformed logits, as a new tensor."""
        changed = logits.clone()
        self.apply(changed, wants_slope=False)
        return changed

    def apply(self, logits: Tensor, *, wants_slope: bool) -> Tensor | None:
        """Transform `logits` in place. Returns f' without the scale, if `wants_slope`; None if it is 1 everywhere."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is None:
            return None
        logits.div_(self.cap).tanh_()
        slope = _wide(logits).square().neg_().add_(1.0) if wants_slope else None
        logits.mul_(self.cap)
        return slope


AS_THEY_ARE = LogitTransform()


def token_logprobs(
    head: nn.Module,
    hidden_T: Tensor,
    targets_T: Tensor,
    temperature: float,
    chunk: int,
    transform: LogitTransform = AS_THEY_ARE,
) -> Tensor:
    """(T,) log-probabilities (nats) of the targets (T,). hidden_T: (T, H); `head` maps it to ``head.out_features``
    logits; `chunk`: maximum number of rows of logits that exist at once.
    """
    return _compute(head, hidden_T, targets_T, temperature, chunk, transform, False)[0]


def logprobs_and_entropy(
    head: nn.Module,
    hidden_T: Tensor,
    targets_T: Tensor,
    temperature: float,
    chunk: int,
    transform: LogitTransform = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """``token_logprobs``, and the (T,) entropies (nats) of the same distributions, without a gradient."""
    logp_T, entropy_T = _compute(head, hidden_T, targets_T, temperature, chunk, transform, True)
    return logp_T, entropy_T


def chunk_rows(vocab_size: int, dtype: torch.dtype, most: int) -> int:
    """Rows of a chunk: at most `most`, and at most CHUNK_BYTES of logits."""
    return max(1, min(most, CHUNK_BYTES // (vocab_size * dtype.itemsize)))


def _compute(
    head: nn.Module,
    hidden_T: Tensor,
    targets_T: Tensor,
    temperature: float,
    chunk: int,
    transform: LogitTransform,
    wants_entropy: bool,
) -> tuple[Tensor, Tensor]:
    if isinstance(head, nn.Linear) and not any(weight.requires_grad for weight in head.parameters()):
        wants_grad = hidden_T.requires_grad and torch.is_grad_enabled()
        rows = chunk_rows(head.weight.shape[0], head.weight.dtype, chunk)
        return _frozen_head(
            hidden_T, head.weight, head.bias, targets_T, temperature, rows, transform, wants_grad, wants_entropy
        )

    def of_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _picked(head(hidden), targets, temperature, transform, wants_entropy)

    rows = chunk_rows(cast(int, head.out_features), hidden_T.dtype, chunk)
    chunks = list(zip(hidden_T.split(rows), targets_T.split(rows), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        found = [of_chunk(*part) for part in chunks]
    else:
        again = partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
        found = [again(*part) for part in chunks]
    logp, entropy = zip(*found, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Picked(torch.autograd.Function):
    """Log-probability and entropy of rows of logits. Overwrites the logits; autograd refuses any other use of them."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        transform: LogitTransform,
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        logits = logits.detach()
        logp, entropy = _into(logits, targets, temperature, transform, wants_grad, wants_entropy)
        if wants_grad:
            divisor = temperature / transform.scale
            ctx.save_for_backward(logits if divisor == 1.0 else logits.div_(divisor))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (grads[0][:, None] * slope).to(slope.dtype), None, None, None, None


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        hidden_T: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        chunk: int,
        transform: LogitTransform,
        wants_grad: bool,
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        slope_T = torch.empty_like(hidden_T) if wants_grad else None
        found = []
        for first in range(0, len(hidden_T), chunk):
            part = slice(first, first + chunk)
            logits = nn.functional.linear(hidden_T[part], weight, bias)
            found.append(_into(logits, targets_T[part], temperature, transform, wants_grad, wants_entropy))
            if slope_T is not None:
                torch.mm(logits, weight, out=slope_T[part])
            del logits  # free the memory before the next chunk
        logp_T, entropy_T = (torch.cat(column) for column in zip(*found, strict=True))
        if slope_T is not None:
            divisor = temperature / transform.scale
            ctx.save_for_backward(slope_T if divisor == 1.0 else slope_T.div_(divisor))
        ctx.mark_non_differentiable(entropy_T)
        return logp_T, entropy_T

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope_T,) = ctx.saved_tensors
        return (grads[0][:, None] * slope_T).to(slope_T.dtype), *8 * [None]


def _into(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    transform: LogitTransform,
    wants_slope: bool,
    wants_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n,), and entropies (n,), or (0,) if not wanted. Overwrites `logits` (n, V), with the slope if
    wanted."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp = torch.empty(len(logits), dtype=wide, device=logits.device)
    entropy = torch.empty(len(logits) if wants_entropy else 0, dtype=wide, device=logits.device)
    rows = len(logits) if logits.device.type != "cpu" else BLOCK * torch.get_num_threads() // logits.shape[1]
    rows = max(1, rows)
    for first in range(0, len(logits), rows):
        part = slice(first, first + rows)
        of_part = entropy[part] if wants_entropy else None
        _softmax(logits[part], targets[part], temperature, transform, logp[part], of_part, wants_slope)
    return logp, entropy


def _softmax(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    transform: LogitTransform,
    logp: Tensor,
    entropy: Tensor | None,
    wants_slope: bool,
) -> None:
    """Fill `logp` and `entropy`, each (n,). Overwrites `logits` (n, V): if `wants_slope` with (e(y) - softmax) f',
    without the scale and the temperature."""
    slope = transform.apply(logits, wants_slope=wants_slope)
    wide = _wide(logits)  # no copy if the logits are in this dtype already
    if temperature != 1.0:
        wide.div_(temperature)
    wide.sub_(wide.amax(-1, keepdim=True))
    at_target = wide.gather(1, targets[:, None])
    shifted = None if entropy is None else wide.clone()
    wide.exp_()
    total = wide.sum(-1, keepdim=True)
    log_total = total.log()
    at_target -= log_total
    logp.copy_(at_target[:, 0])
    if entropy is not None and shifted is not None:  # entropy of p = exp(x) / z: log z - sum p x
        entropy.copy_(log_total[:, 0] - torch.linalg.vecdot(wide, shifted) / total[:, 0])
    if wants_slope:
        wide.div_(total.neg_()).scatter_(1, targets[:, None], -at_target.expm1())  # exact where p is near 1
        if slope is not None:
            wide.mul_(slope)
        if wide is not logits:
            logits.copy_(wide)


_picked: Callable[..., tuple[Tensor, Tensor]] = _Picked.apply
_frozen_head: Callable[..., tuple[Tensor, Tensor]] = _FrozenHead.apply
