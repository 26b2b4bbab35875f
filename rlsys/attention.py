"""Causal attention over a pack (rlsys/segments.py), as an attention function of transformers; no flash-attn needed.

The segments travel as a keyword argument of the model's forward down to here, so there is no global state. Windows,
soft caps and sinks come from each layer the same way. rlsys/attention_kernels.py has the arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlsys import attention_kernels as kernels
from rlsys.errors import ConfigError
from rlsys.segments import ALONE, Segments

NAME = "rlsys_packed"
SEGMENTS = "rlsys_segments"  # the keyword argument of the model's forward


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
    if kwargs.get("position_bias") is not None:
        raise ConfigError(f"{name} wants position_bias in its attention, which packed attention does not compute")
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
    if (sees & ~segments.mask(None)).any():
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
