"""Causal attention over packed sequences (rlsys/modeling/prefix_layout.py), as an attention function for transformers.
Does not need flash-attn.

The model's forward passes the segments to this function as a keyword argument, so there is no global state. Windows,
soft caps and sinks are passed by each layer in the same way. The kernels are in rlsys/modeling/attention_kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rlsys.errors import ConfigError
from rlsys.modeling import attention_kernels as kernels
from rlsys.modeling.prefix_layout import Segments

NAME = "rlsys_packed"
SEGMENTS = "rlsys_segments"  # the keyword argument of the model's forward
_IGNORED = frozenset({"dropout", "position_ids", "cache_position"})  # arguments without effect in evaluation mode


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, head_dim)
    key: Tensor,  # (1, Hkv, T, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,  # w: a token attends to itself and the w - 1 tokens before it
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (Hq,) sinks
    is_causal: bool | None = None,
    rlsys_segments: Segments | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """(1, T, Hq, head_dim): each token attends to itself, to earlier tokens of its segment, and to the segment that it
    reads.

    Raises:
        ConfigError: the model uses an attention feature that is not implemented here.
    """
    name, segments, window = type(module).__name__, rlsys_segments, sliding_window
    if segments is None:
        raise ConfigError(f"{name} does not pass {SEGMENTS} on to its attention, so its sequences cannot be packed")
    given = {key for key, argument in kwargs.items() if argument is not None and argument is not False}
    unknown = sorted(given - _IGNORED)
    if unknown or is_causal is False:
        what = ", ".join(unknown) or "later tokens"
        raise ConfigError(f"{name} uses {what} in its attention, which packed attention does not implement")
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
    """Register NAME with transformers. Can be called repeatedly."""
    AttentionInterface.register(NAME, packed_attention)
