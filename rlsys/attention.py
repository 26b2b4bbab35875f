"""Causal attention over a pack (rlsys/segments.py), as an attention function of transformers; no flash-attn needed.

The segments travel as a keyword argument of the model's forward down to here, so there is no global state.

    CPU                       torch's flash kernel on rectangles of similar lengths, and once more for shared prompts
    CUDA, half precision      torch's own variable-length kernel; a shared prompt's keys are repeated for its readers
    elsewhere                 scaled_dot_product_attention under a mask

Of tokens that see their own segment (1) and a prompt (2), with outputs o and L = log sum exp of their scores:

    L = log(e^L1 + e^L2)        o = e^(L1 - L) o1 + e^(L2 - L) o2

and the gradient of each part is what the kernel's backward gives for the common o and L: its probabilities are then
exp(score - L), and its correction <do, o> that of the whole (FlashAttention-2, arXiv:2307.08691, section 3.1.2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from rlsys.errors import ConfigError
from rlsys.segments import ALONE, Rectangle, Segments

NAME = "rlsys_packed"
SEGMENTS = "rlsys_segments"  # the keyword argument of the model's forward
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # what some models ask of their attention, and we do not compute


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, head_dim)
    key: Tensor,  # (1, Hkv, T, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    rlsys_segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, T, Hq, head_dim): every token attends to the earlier ones of its own segment and to itself.

    Raises:
        ConfigError: the model asks for something that this attention does not do.
    """
    name = type(module).__name__
    if rlsys_segments is None:
        raise ConfigError(f"{name} does not pass {SEGMENTS} on to its attention, so its sequences cannot be packed")
    for feature in _UNSUPPORTED:
        if kwargs.get(feature) is not None:
            raise ConfigError(f"{name} wants {feature} in its attention, which packed attention does not compute")
    window = kwargs.get("sliding_window")
    if window is not None and window < rlsys_segments.longest:
        raise ConfigError(
            f"{name} has a sliding window of {window} tokens and a sequence has {rlsys_segments.longest}; "
            "packed attention has no window: wanted model.max_length within the window"
        )
    if query.device.type == "cpu":
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, H, head_dim)
        return _two_part_attention(q, k, v, rlsys_segments, scaling)[None], None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return _varlen(q, k, v, rlsys_segments, scaling)[None], None
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=rlsys_segments.mask(), scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    # Written after torch's documentation; no GPU was at hand to run it. `make gpu-check` does, and `prove_packing` sees
    # at every load whether a reader's last query stands at its last key.
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 there is no such argument, and fewer heads of keys need none.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    lists = segments.key_lists
    if lists.keys is not None:
        key, value = key.index_select(0, lists.keys), value.index_select(0, lists.keys)
    attended = varlen_attn(
        query, key, value, lists.offsets, lists.key_offsets, lists.longest, lists.longest_keys,
        scale=scaling, window_size=(-1, 0), **grouped,
    )  # fmt: skip
    return cast(Tensor, attended)


class _TwoPartAttention(torch.autograd.Function):
    """The formulas of the module's docstring. Kept for the way back: q, k, v, the output and L, nothing padded
    and nothing cast."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
        wide = _wide(query.dtype)
        out = torch.empty(query.shape, dtype=wide)
        total = torch.empty(query.shape[:2], dtype=wide)
        for shape in segments.rectangles:
            o, logsumexp = _flash(*(_rows(x, shape) for x in (query, key, value)), 0.0, True, scale=scale)
            _put_rows(out, shape, o.transpose(1, 2))
            _put_rows(total, shape, logsumexp.transpose(1, 2))
        for reading in segments.readings:
            readers, read = slice(reading.start, reading.stop), slice(reading.first, reading.last)
            o, logsumexp = _flash(*(_heads(x) for x in (query[readers], key[read], value[read])), scale=scale)
            own = total[readers]
            gap = logsumexp[0].T - own
            out[readers] += (o[0].transpose(0, 1) - out[readers]) * gap.sigmoid()[..., None]
            own += torch.nn.functional.softplus(gap)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty(x.shape, dtype=total.dtype) for x in (query, key, value))
        for shape in ctx.segments.rectangles:
            found = _flash_backward(
                _rows(grads[0], shape, padding=0.0), *(_rows(x, shape) for x in (query, key, value, out)),
                _rows(total[..., None], shape)[..., 0], 0.0, True, scale=ctx.scale,
            )  # fmt: skip
            for whole, part in zip((of_query, of_key, of_value), found, strict=True):
                _put_rows(whole, shape, part.transpose(1, 2))
        for reading in ctx.segments.readings:
            readers, read = slice(reading.start, reading.stop), slice(reading.first, reading.last)
            found = _flash_backward(
                _heads(grads[0][readers]), _heads(query[readers]), _heads(key[read]), _heads(value[read]),
                _heads(out[readers]), total[readers].T[None].contiguous(), 0.0, False, scale=ctx.scale,
            )  # fmt: skip
            for whole, part in zip((of_query[readers], of_key[read], of_value[read]), found, strict=True):
                whole += part[0].transpose(0, 1)
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None


_two_part_attention: Callable[..., Tensor] = _TwoPartAttention.apply
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the kernel computes in: on CPU it is slower in bfloat16 than in float32, casts included."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads(tokens: Tensor) -> Tensor:
    """(t, H, head_dim) as one row of a batch, (1, H, t, head_dim)."""
    return tokens.to(_wide(tokens.dtype)).transpose(0, 1)[None]


def _rows(tokens: Tensor, shape: Rectangle, padding: float | None = None) -> Tensor:
    """(n, H, L, ...) of the pack's (T, H, ...). Padding repeats a row's last token, unless it is to be a number."""
    if shape.span:
        cells = tokens[slice(*shape.span)]
    elif padding is None:
        cells = tokens.index_select(0, shape.cells)
    else:
        cells = tokens.new_full((shape.rows * shape.length, *tokens.shape[1:]), padding)
        cells.index_copy_(0, shape.places, tokens.index_select(0, shape.tokens))
    cells = cells.to(_wide(tokens.dtype))
    return cells.reshape(shape.rows, shape.length, *tokens.shape[1:]).transpose(1, 2)


def _put_rows(tokens: Tensor, shape: Rectangle, rows: Tensor) -> None:
    """(n, L, H, ...) into their places of the pack's (T, H, ...)."""
    cells = rows.reshape(shape.rows * shape.length, *tokens.shape[1:])
    if shape.span:
        tokens[slice(*shape.span)] = cells
    else:
        tokens.index_copy_(0, shape.tokens, cells.index_select(0, shape.places))


def prove_packing(model: PreTrainedModel) -> None:
    """Refuse a model that leaks between packed sequences, or whose logits are not its output layer's.

    The gradient of one segment's output with respect to another segment's input has to be exactly zero, which also
    finds leaks that no attention function sees (convolutions, recurrent states).

    Raises:
        ConfigError: the model cannot be trained packed, and why.
    """
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(f"{name} has no exchangeable attention function, which packing needs")
    device = model.device
    embed = model.get_input_embeddings()
    tokens = torch.arange(7, device=device)[None] % embed.weight.shape[0]
    inputs = embed(tokens).detach().requires_grad_()
    segments = Segments(np.array([2, 2, 1, 2]), np.array([ALONE, 0, 0, ALONE]), device)
    packed = {  # a b | c d | e | f g, where c d and e go on from a b
        "position_ids": torch.tensor([[0, 1, 2, 3, 2, 0, 1]], device=device),
        "use_cache": False,
        SEGMENTS: segments,
    }
    hidden = model.base_model(inputs_embeds=inputs, **packed).last_hidden_state
    mix = torch.arange(hidden.shape[-1], device=device).cos().to(hidden.dtype)  # a sum is blind to norms
    sees = torch.stack(
        [torch.autograd.grad(each, inputs, retain_graph=True)[0][0].ne(0).any(-1) for each in hidden[0] @ mix]
    )
    if (sees & ~segments.mask()).any():
        raise ConfigError(f"{name} lets a token see another sequence of the same pack; it cannot be trained packed")
    if not sees[[1, 2, 3, 4, 6], [0, 1, 2, 1, 5]].all():
        raise ConfigError(f"{name}: a token does not see the one before it; its attention ignores {NAME}")
    head = model.get_output_embeddings()
    with torch.no_grad():
        logits = model(inputs_embeds=inputs, **packed).logits
        if head is None or not torch.allclose(head(hidden), logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            raise ConfigError(f"{name} changes its logits after the output layer, which log-probabilities here do not")


def register() -> None:
    """Make NAME known to transformers; again is harmless."""
    AttentionInterface.register(NAME, packed_attention)
