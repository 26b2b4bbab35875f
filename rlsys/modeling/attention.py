"""Causal attention over a pack (rlsys/modeling/prefix_layout.py), as an attention function of transformers; no
flash-attn needed.

The segments travel as a keyword argument of the model's forward down to here, so there is no global state. Windows,
soft caps and sinks come from each layer the same way. rlsys/modeling/attention_kernels.py has the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rlsys.errors import ConfigError
from rlsys.modeling import attention_kernels as kernels
from rlsys.modeling.prefix_layout import Segments

NAME = "rlsys_packed"
SEGMENTS = "rlsys_segments"  # the keyword argument of the model's forward
_NO_MATTER = frozenset({"dropout", "position_ids", "cache_position"})  # in evaluation, as what is None or False


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, head_dim)
    key: Tensor,  # (1, Hkv, T, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,  # a token sees itself and so many less one before it
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (Hq,) sinks
    is_causal: bool | None = None,
    rlsys_segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, T, Hq, head_dim): every token attends to the earlier ones of its own segment and to itself.

    Raises:
        ConfigError: the model asks for something that this attention does not do.
    """
    name, segments, window = type(module).__name__, rlsys_segments, sliding_window
    if segments is None:
        raise ConfigError(f"{name} does not pass {SEGMENTS} on to its attention, so its sequences cannot be packed")
    given = {key for key, argument in kwargs.items() if argument is not None and argument is not False}
    wants = sorted(given - _NO_MATTER)
    if wants or is_causal is False:
        what = ", ".join(wants) or "later tokens"
        raise ConfigError(f"{name} wants {what} in its attention, which packed attention does not compute")
    if window is not None and window >= segments.longest:
        window = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, H, head_dim)
    if query.device.type == "cpu" and window is None and softcap is None:
        return kernels.two_parts(q, k, v, s_aux, segments, scale)[None], None
    if query.device.type == "cpu" or softcap is not None or s_aux is not None:
        return kernels.tiled(q, k, v, s_aux, segments, scale, window, softcap)[None], None
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return (kernels.varlen if half else kernels.masked)(q, k, v, segments, scale, window)[None], None


def register() -> None:
    """Make NAME known to transformers; again is harmless."""
    AttentionInterface.register(NAME, packed_attention)
