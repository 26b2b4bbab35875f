"""Kernels of packed attention (rlsys/modeling/prefix_layout.py). Queries, keys and values are (T, heads, head_dim).

    two_parts   torch's flash kernel for CPU: one call per rectangle of similar lengths, one more per shared prompt
    tiled       sliding windows and soft caps: blocks of queries with the keys that they attend to. Uses the same kernel
                with a mask; with a soft cap, or on another device than a CPU, matrix products
    varlen      torch's variable-length kernel for CUDA; the keys of a shared prompt are repeated for each reader
    masked      scaled_dot_product_attention with a (T, T) mask

For tokens that attend to their segment (1) and to a prompt (2), with outputs o and L = log sum exp of the scores:

    L = log(e^L1 + e^L2)        o = e^(L1 - L) o1 + e^(L2 - L) o2

The gradient of each part is the result of the kernel's backward with the combined o and L: its probabilities are then
exp(score - L), and its correction term <do, o> is that of the combined output (FlashAttention-2, arXiv:2307.08691,
section 3.1.2).

A sink is an additional score s that every token attends to, with value 0: it is part of L, and its gradient is
-exp(s - L) <do, o>. A soft cap c replaces a score by c tanh(score / c).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softplus

from rlsys.modeling.autograd_context import AutogradContext
from rlsys.modeling.prefix_layout import Rectangle, Segments, Tile

SCORE_BYTES = 32 * 2**20  # limit of the scores that exist at once in `tiled` by matrix products


def masked(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    attended = scaled_dot_product_attention(
        q, k, v, attn_mask=segments.mask(window), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return attended[0].transpose(0, 1)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    # Written from torch's documentation, never run on a GPU. `make gpu-check` tests it, and `check_packing` verifies at
    # every load that a reader's last query is aligned with its last key.
    from torch.nn.attention.varlen import varlen_attn

    # torch before 2.12 has no argument enable_gqa, and accepts fewer heads of keys without it.
    takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    attend = partial(varlen_attn, enable_gqa=True) if takes_gqa else varlen_attn
    lists = segments.key_lists(window)
    if lists.keys is not None:
        key, value = key.index_select(0, lists.keys), value.index_select(0, lists.keys)
    attended = attend(
        query, key, value, lists.offsets, lists.key_offsets, lists.longest, lists.longest_keys,
        scale=scale, window_size=(-1 if window is None else window - 1, 0),
    )  # fmt: skip
    return cast(Tensor, attended)


class _TwoPartsContext(AutogradContext, Protocol):
    segments: Segments
    scale: float | None


class _TwoParts(torch.autograd.Function):
    """Segment and shared prompt, combined by the module docstring's formulas. Saves q, k, v, the output and L for the
    backward pass, without padding and without casts."""

    @staticmethod
    def forward(
        ctx: _TwoPartsContext,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: Segments,
        scale: float | None,
    ) -> Tensor:
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
            own += softplus(gap)
        _sink(out, total, sinks)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, total)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: _TwoPartsContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, total = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty(x.shape, dtype=total.dtype) for x in (query, key, value))
        for shape in ctx.segments.rectangles:
            found = _flash_backward(
                _rows(grads[0], shape, padding=0.0), *(_rows(x, shape) for x in (query, key, value, out)),
                _rows(total[..., None], shape)[..., 0], 0.0, True, scale=ctx.scale,
            )  # fmt: skip
            for total_grad, part in zip((of_query, of_key, of_value), found, strict=True):
                _put_rows(total_grad, shape, part.transpose(1, 2))
        for reading in ctx.segments.readings:
            readers, read = slice(reading.start, reading.stop), slice(reading.first, reading.last)
            found = _flash_backward(
                _heads(grads[0][readers]), _heads(query[readers]), _heads(key[read]), _heads(value[read]),
                _heads(out[readers]), total[readers].T[None].contiguous(), 0.0, False, scale=ctx.scale,
            )  # fmt: skip
            for total_grad, part in zip((of_query[readers], of_key[read], of_value[read]), found, strict=True):
                total_grad += part[0].transpose(0, 1)
        of_sinks = _of_sinks(sinks, grads[0], out, total) if ctx.needs_input_grad[3] else None
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), of_sinks, None, None


class _TiledContext(AutogradContext, Protocol):
    segments: Segments
    scale: float
    window: int | None
    cap: float | None
    products: bool


class _Tiled(torch.autograd.Function):
    """Attention by tiles. Each query is in exactly one tile, so outputs need no merging; a key can be in several."""

    @staticmethod
    def forward(
        ctx: _TiledContext,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: Segments,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        wide = _wide(query.dtype)
        out = torch.empty(query.shape, dtype=wide, device=query.device)
        total = torch.empty(query.shape[:2], dtype=wide, device=query.device)
        products = cap is not None or query.device.type != "cpu"
        for tile in segments.tiles(window):
            q = _gathered(query, tile.cells, tile.rows)
            k, v = (_gathered(x, tile.keys, tile.rows) for x in (key, value))
            if products:
                o, logsumexp = _by_products(q, k, v, tile.hidden(window), scale, cap)
            else:
                bias = _bias(tile, window, q)
                o, logsumexp = _flash(q, k, v, 0.0, bias is None, attn_mask=bias, scale=scale)
            _put_rows(out, tile, o.transpose(1, 2))
            _put_rows(total, tile, logsumexp.transpose(1, 2))
        _sink(out, total, sinks)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, total)
        ctx.segments, ctx.scale, ctx.window, ctx.cap, ctx.products = segments, scale, window, cap, products
        return out

    @staticmethod
    def backward(ctx: _TiledContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, total = ctx.saved_tensors
        of_query = torch.empty(query.shape, dtype=total.dtype, device=query.device)
        of_key, of_value = (torch.zeros(x.shape, dtype=total.dtype, device=x.device) for x in (key, value))
        for tile in ctx.segments.tiles(ctx.window):
            q, o = (_gathered(x, tile.cells, tile.rows) for x in (query, out))
            k, v = (_gathered(x, tile.keys, tile.rows) for x in (key, value))
            # Padding can attend to other keys than the token that it repeats; L = inf makes its probabilities 0.
            g, logsumexp = _padded(grads[0], tile, 0.0), _padded(total, tile, math.inf).contiguous()
            if ctx.products:
                hidden = tile.hidden(ctx.window)
                found = _by_products_backward(g, q, k, v, o, logsumexp, hidden, ctx.scale, ctx.cap)
            else:
                bias = _bias(tile, ctx.window, q)
                found = _flash_backward(g, q, k, v, o, logsumexp, 0.0, bias is None, attn_mask=bias, scale=ctx.scale)
            _put_rows(of_query, tile, found[0].transpose(1, 2))
            for total_grad, part in zip((of_key, of_value), found[1:], strict=True):
                total_grad.index_add_(0, tile.keys, part.transpose(1, 2).reshape(-1, *total_grad.shape[1:]))
        of_sinks = _of_sinks(sinks, grads[0], out, total) if ctx.needs_input_grad[3] else None
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), of_sinks, *4 * [None]


two_parts: Callable[..., Tensor] = _TwoParts.apply
tiled: Callable[..., Tensor] = _Tiled.apply
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _sink(out: Tensor, total: Tensor, sinks: Tensor | None) -> None:
    """Add the sinks (H,) to (T, H, head_dim) outputs and (T, H) log-sum-exps, in place."""
    if sinks is not None:
        gap = sinks.detach().to(total.dtype) - total
        out *= gap.neg().sigmoid()[..., None]
        total += softplus(gap)


def _of_sinks(sinks: Tensor, grad: Tensor, out: Tensor, total: Tensor) -> Tensor:
    corrections = torch.linalg.vecdot(grad.to(total.dtype), out.to(total.dtype))
    return ((sinks - total).exp() * corrections).sum(0).neg().to(sinks.dtype)


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Output (n, Hq, L, head_dim) and log-sum-exp (n, Hq, L) of rows, as returned by the flash kernel."""
    out, total = torch.empty_like(query), query.new_empty(query.shape[:3])
    for rows in _portions(query, key):
        q, k, v = _grouped(query[rows], key), key[rows], value[rows]
        scores = _scores(q, k, hidden, scale, cap)[0]
        logsumexp = scores.logsumexp(-1)
        out[rows] = (scores.sub_(logsumexp[..., None]).exp_().flatten(2, 3) @ v).view(out[rows].shape)
        total[rows] = logsumexp.flatten(1, 2)
    return out, total


def _by_products_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    hidden: Tensor,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    correction = torch.linalg.vecdot(grad, out)
    of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for rows in _portions(query, key):
        g, q, k, v = _grouped(grad[rows], key), _grouped(query[rows], key), key[rows], value[rows]
        scores, slope = _scores(q, k, hidden, scale, cap)
        shape = scores.shape[:-1]
        probabilities = scores.sub_(total[rows].view(shape)[..., None]).exp_()
        of_value[rows] = probabilities.flatten(2, 3).transpose(-1, -2) @ g
        of_scores = (g @ v.transpose(-1, -2)).view(scores.shape)
        of_scores.sub_(correction[rows].view(shape)[..., None]).mul_(probabilities).mul_(slope)
        of_query[rows] = (of_scores.flatten(2, 3) @ k).view(of_query[rows].shape)
        of_key[rows] = of_scores.flatten(2, 3).transpose(-1, -2) @ q
    return of_query, of_key, of_value


def _scores(
    query: Tensor, key: Tensor, hidden: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, Tensor | float]:
    """(n, Hkv, Hq / Hkv, L, K), and their slope with respect to the products."""
    scores = (query @ key.transpose(-1, -2)).mul_(scale).view(*query.shape[:2], -1, *hidden.shape)
    slope: Tensor | float = scale
    if cap is not None:
        scores.div_(cap).tanh_()
        slope = scores.square().neg_().add_(1.0).mul_(scale)
        scores.mul_(cap)
    return scores.masked_fill_(hidden, -math.inf), slope


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """(n, Hq, L, head_dim) as (n, Hkv, Hq / Hkv * L, head_dim): query heads that share keys are joined."""
    return query.reshape(len(query), key.shape[1], -1, query.shape[-1])


def _portions(query: Tensor, key: Tensor) -> list[slice]:
    """Slices of rows whose scores fit in SCORE_BYTES together; at least one row each."""
    each = query.shape[1] * query.shape[2] * key.shape[2] * query.itemsize
    rows = max(1, SCORE_BYTES // each)
    return [slice(first, first + rows) for first in range(0, len(query), rows)]


def _bias(tile: Tile, window: int | None, query: Tensor) -> Tensor | None:
    """Mask that the flash kernel adds to the scores; None if the tile is purely causal."""
    if tile.is_causal(window):
        return None
    return query.new_zeros(tile.length, tile.before + tile.length).masked_fill_(tile.hidden(window), -math.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the kernel computes: on CPU bfloat16 is slower than float32 including the casts."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads(tokens: Tensor) -> Tensor:
    """Reshape (t, H, head_dim) to a batch of one row, (1, H, t, head_dim)."""
    return tokens.to(_wide(tokens.dtype)).transpose(0, 1)[None]


def _gathered(tokens: Tensor, cells: Tensor, rows: int) -> Tensor:
    """Gather rows (n, H, cells / n, ...) from the pack's (T, H, ...)."""
    found = tokens.index_select(0, cells).to(_wide(tokens.dtype))
    return found.view(rows, -1, *tokens.shape[1:]).transpose(1, 2)


def _padded(tokens: Tensor, shape: Rectangle | Tile, padding: float) -> Tensor:
    """Gather rows (n, H, L, ...) from the pack's (T, H, ...), padded with the value `padding`."""
    cells = tokens.new_full((shape.rows * shape.length, *tokens.shape[1:]), padding)
    cells.index_copy_(0, shape.places, tokens.index_select(0, shape.tokens))
    return cells.to(_wide(tokens.dtype)).view(shape.rows, shape.length, *tokens.shape[1:]).transpose(1, 2)


def _rows(tokens: Tensor, shape: Rectangle, padding: float | None = None) -> Tensor:
    """Gather rows (n, H, L, ...) from the pack's (T, H, ...). `padding` None: repeat the last token of a row."""
    if shape.span:
        cells = tokens[slice(*shape.span)].to(_wide(tokens.dtype))
        return cells.reshape(shape.rows, shape.length, *tokens.shape[1:]).transpose(1, 2)
    return _gathered(tokens, shape.cells, shape.rows) if padding is None else _padded(tokens, shape, padding)


def _put_rows(tokens: Tensor, shape: Rectangle | Tile, rows: Tensor) -> None:
    """Scatter rows (n, L, H, ...) into the pack's (T, H, ...), in place."""
    cells = rows.reshape(shape.rows * shape.length, *tokens.shape[1:])
    if isinstance(shape, Rectangle) and shape.span:
        tokens[slice(*shape.span)] = cells
    else:
        tokens.index_copy_(0, shape.tokens, cells.index_select(0, shape.places))
