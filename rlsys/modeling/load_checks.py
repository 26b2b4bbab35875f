"""What is proved of a model when it is loaded: that it can be trained packed, and what it does after its output layer.

Each proof runs the model on a few tokens and looks at what comes out. A model's name or version decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlsys.errors import ConfigError
from rlsys.modeling import attention
from rlsys.modeling.logprobs import AS_THEY_ARE, LogitTransform
from rlsys.modeling.prefix_layout import ALONE, Segments

_PROOF = "rlsys_proof"  # packed attention that also notes the window of each layer
_LAYER_TYPES = ("full_attention", "sliding_attention")
_FAR, _NEAR = 1e4, 1e-3  # logits at which a cap is reached, and at which it does nothing


def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model that leaks between packed sequences, or whose attention is not all in its attention function.

    The gradient of one segment's output with respect to another segment's input has to be exactly zero, which also
    finds leaks that no attention function sees (convolutions, recurrent states).

    Raises:
        ConfigError: the model cannot be trained packed, and why.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()).difference(_LAYER_TYPES))
    if kinds:
        raise ConfigError(
            f"{name} has layers of {', '.join(kinds)}, which packed sequences cannot pass apart from each other; "
            f"wanted {' and '.join(_LAYER_TYPES)} alone"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(f"{name} has no exchangeable attention function, which packing needs")
    device = model.device
    embed = model.get_input_embeddings()
    inputs = embed(_telling_tokens(embed.weight)[None]).detach().requires_grad_()
    segments = Segments(np.array([2, 2, 1, 2]), np.array([ALONE, 0, 0, ALONE]), device)
    packed = {  # a b | c d | e | f g, where c d and e go on from a b
        "position_ids": torch.tensor([[0, 1, 2, 3, 2, 0, 1]], device=device),
        "use_cache": False,
        attention.SEGMENTS: segments,
    }
    with _noting_windows(model) as windows:
        hidden = model.base_model(inputs_embeds=inputs, **packed).last_hidden_state
    mix = torch.arange(hidden.shape[-1], device=device).cos().to(hidden.dtype)  # a sum is blind to norms
    slopes = torch.stack([torch.autograd.grad(each, inputs, retain_graph=True)[0][0] for each in hidden[0] @ mix])
    if not slopes.isfinite().all():
        raise ConfigError(
            f"{name}: gradients of the load's own check are not finite in {model.dtype}; wanted weights without inf or "
            "nan, and a model.dtype in which they fit"
        )
    sees = slopes.ne(0).any(-1)
    if (sees & ~segments.mask(None)).any():
        raise ConfigError(f"{name} lets a token see another sequence of the same pack; it cannot be trained packed")
    if not sees[[1, 2, 3, 4, 6], [0, 1, 2, 1, 5]].all():
        raise ConfigError(f"{name}: a token does not see the one before it; its attention ignores {attention.NAME}")
    _check_windows(name, config, windows)


def _telling_tokens(embedding: Tensor) -> Tensor:
    """Seven tokens, of 64 spread over the vocabulary those with the largest rows: a row of zeros, as a padding token
    has, makes each norm above it multiply gradients by a thousand, which overflows in a deep model."""
    count = embedding.shape[0]
    spread = torch.linspace(0, count - 1, min(64, count), device=embedding.device).long()
    best = embedding.detach()[spread].float().norm(dim=-1).argsort(descending=True, stable=True)
    return spread[best[torch.arange(7, device=best.device) % len(best)]]


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """What the model does to its output layer's logits: their scale, or their soft cap.

    Read from what the model makes of logits that stand in for its own, in float32 and over seven orders of magnitude:
    its own are too small to tell a cap of 30 from none.

    Raises:
        ConfigError: it is neither, or the output layer does not read what the layers end with.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{name} has no output layer; wanted a causal language model")
    ids = torch.arange(4, device=model.device)[None] % head.weight.shape[0]
    count = 4 * head.weight.shape[0]
    steps = torch.linspace(-1, 1, count, dtype=torch.float64, device=model.device)
    ramp = (steps.sign() * _NEAR * (_FAR / _NEAR) ** steps.abs()).float()
    read: list[Tensor] = []

    def stand_in(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        read.append(args[0])
        return ramp.view(out.shape)

    given: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": torch.arange(4, device=model.device)[None],
        "use_cache": False,
        attention.SEGMENTS: Segments(np.array([4]), np.array([ALONE]), model.device),
    }
    hook = head.register_forward_hook(stand_in)
    try:
        with torch.no_grad():
            seen = model(**given).logits.float().flatten()
            hidden = model.base_model(**given).last_hidden_state
    finally:
        hook.remove()
    reads_hidden = torch.allclose(read[0], hidden, rtol=1e-2, atol=1e-2)
    scale, cap = float(seen[-1] / ramp[-1]), float(seen[-1])
    for found in (AS_THEY_ARE, LogitTransform(scale=scale), LogitTransform(cap=cap)):
        if reads_hidden and torch.allclose(found.of(ramp), seen, rtol=1e-4, atol=0.0):
            return found
    raise ConfigError(
        f"{name} changes its logits before or after the output layer by something else than one scale or one soft cap, "
        "which log-probabilities here do not compute"
    )


@contextmanager
def _noting_windows(model: PreTrainedModel) -> Iterator[dict[int, int | None]]:
    """The window that each layer asks for in the block, by its number."""
    windows: dict[int, int | None] = {}

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        windows[int(getattr(module, "layer_idx", len(windows)))] = kwargs.get("sliding_window")
        return attention.packed_attention(module, *args, **kwargs)

    AttentionInterface.register(_PROOF, noting)
    config = model.config.get_text_config()
    config._attn_implementation = _PROOF
    try:
        yield windows
    finally:
        config._attn_implementation = attention.NAME


def _check_windows(name: str, config: Any, windows: dict[int, int | None]) -> None:
    """A window that a model only puts into transformers' masks would be lost here."""
    kinds = getattr(config, "layer_types", None)
    for layer, found in sorted(windows.items()):
        slides = kinds[layer] == "sliding_attention" if kinds else True
        wanted = getattr(config, "sliding_window", None) if slides else None
        if found != wanted:
            raise ConfigError(
                f"{name}: layer {layer} asks its attention for a window of {found}, config.json says {wanted}; "
                "wanted the same, or sequences cannot be packed rightly"
            )
