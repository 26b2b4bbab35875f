"""Checks of a loaded model: that it can be trained on packed sequences, and how it transforms its logits.

Each check runs the model on a few tokens and inspects the outputs. No check depends on the model's name or version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from rlsys.errors import ConfigError
from rlsys.modeling import attention
from rlsys.modeling.logprobs import AS_THEY_ARE, LogitTransform
from rlsys.modeling.prefix_layout import ALONE, Segments

Arguments = ParamSpec("Arguments")
Output = TypeVar("Output")

_PROOF = "rlsys_proof"  # packed attention that also records the window of each layer
_LAYER_TYPES = ("full_attention", "sliding_attention")
_FAR, _NEAR = 1e4, 1e-3  # magnitudes of logits at which a soft cap saturates, and at which it has no effect


def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model that leaks information between packed sequences, or bypasses the attention function.

    The gradient of one segment's output with respect to another segment's input must be exactly zero. This also finds
    leaks outside of attention (convolutions, recurrent states).

    Raises:
        ConfigError: the model cannot be trained on packed sequences; the message has the reason.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()).difference(_LAYER_TYPES))
    if kinds:
        raise ConfigError(
            f"{name} has layers of type {', '.join(kinds)}, which cannot keep packed sequences separate; wanted only "
            f"{' and '.join(_LAYER_TYPES)}"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(f"{name} does not support custom attention functions, which packed sequences need")
    device = model.device
    embed = model.get_input_embeddings()
    inputs = embed(_telling_tokens(embed.weight)[None]).detach().requires_grad_()
    segments = Segments(np.array([2, 2, 1, 2]), np.array([ALONE, 0, 0, ALONE]), device)
    packed = {  # a b | c d | e | f g, where c d and e continue a b
        "position_ids": torch.tensor([[0, 1, 2, 3, 2, 0, 1]], device=device),
        "use_cache": False,
        attention.SEGMENTS: segments,
    }
    with _noting_windows(model) as windows:
        hidden = model.base_model(inputs_embeds=inputs, **packed).last_hidden_state
    # A plain sum would hide the gradient of norms.
    mix = torch.arange(hidden.shape[-1], device=device).cos().to(hidden.dtype)
    slopes = torch.stack([torch.autograd.grad(each, inputs, retain_graph=True)[0][0] for each in hidden[0] @ mix])
    if not slopes.isfinite().all():
        raise ConfigError(
            f"{name}: the gradients of the packing check are not finite in {model.dtype}; wanted weights without inf "
            "or nan, and a model.dtype that can represent them"
        )
    sees = slopes.ne(0).any(-1)
    if (sees & ~segments.mask(None)).any():
        raise ConfigError(f"{name} leaks information between packed sequences, so it cannot be trained packed")
    if not sees[[1, 2, 3, 4, 6], [0, 1, 2, 1, 5]].all():
        raise ConfigError(f"{name}: a token does not attend to the previous token: the model ignores {attention.NAME}")
    _check_windows(name, config, windows)


def _telling_tokens(embedding: Tensor) -> Tensor:
    """Ids of the seven tokens with the largest embedding norms among 64 spread over the vocabulary. With a row of
    zeros, such as that of a padding token, every norm layer multiplies gradients by about 1,000, which overflows in a
    deep model."""
    count = embedding.shape[0]
    spread = torch.linspace(0, count - 1, min(64, count), device=embedding.device).long()
    best = embedding.detach()[spread].float().norm(dim=-1).argsort(descending=True, stable=True)
    return spread[best[torch.arange(7, device=best.device) % len(best)]]


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """How the model transforms the logits of its output layer: a scale or a soft cap.

    Measured by replacing the output layer's logits with float32 values over seven orders of magnitude. The model's own
    logits on a few tokens are too small to reveal a cap of 30.

    Raises:
        ConfigError: the transform is another one, or the output layer does not read the last hidden state.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{name} has no output layer; wanted a causal language model")
    ids = torch.arange(4, device=model.device)[None] % head.weight.shape[0]
    count = 4 * head.weight.shape[0]
    steps = torch.linspace(-1, 1, count, dtype=torch.float64, device=model.device)
    ramp = (steps.sign() * _NEAR * (_FAR / _NEAR) ** steps.abs()).float()
    head_inputs: list[Tensor] = []

    def replace_logits(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        head_inputs.append(args[0])
        return ramp.view(out.shape)

    given = {
        "input_ids": ids,
        "position_ids": torch.arange(4, device=model.device)[None],
        "use_cache": False,
        attention.SEGMENTS: Segments(np.array([4]), np.array([ALONE]), model.device),
    }
    hook = head.register_forward_hook(replace_logits)
    try:
        with torch.no_grad():
            seen = model(**given).logits.float().flatten()
            hidden = model.base_model(**given).last_hidden_state
    finally:
        hook.remove()
    reads_hidden = torch.allclose(head_inputs[0], hidden, rtol=1e-2, atol=1e-2)
    scale, cap = float(seen[-1] / ramp[-1]), float(seen[-1])
    for transform in (AS_THEY_ARE, LogitTransform(scale=scale), LogitTransform(cap=cap)):
        if reads_hidden and torch.allclose(transform.of(ramp), seen, rtol=1e-4, atol=0.0):
            return transform
    raise ConfigError(
        f"{name} transforms its hidden states or logits around the output layer by more than a scale or a soft cap, "
        "which the learner's log-probabilities do not support"
    )


@contextmanager
def _noting_windows(model: PreTrainedModel) -> Iterator[dict[int, int | None]]:
    """Yield a dict from layer number to the window that the layer passes to attention, filled during the block."""
    windows: dict[int, int | None] = {}

    AttentionInterface.register(_PROOF, _noting(attention.packed_attention, windows))
    config = model.config.get_text_config()
    config._attn_implementation = _PROOF
    try:
        yield windows
    finally:
        config._attn_implementation = attention.NAME


def _noting(attend: Callable[Arguments, Output], windows: dict[int, int | None]) -> Callable[Arguments, Output]:
    """`attend`, which also writes the layer's window to `windows`."""

    def noting(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Output:
        window = cast("int | None", kwargs.get("sliding_window"))
        windows[int(getattr(args[0], "layer_idx", len(windows)))] = window
        return attend(*args, **kwargs)

    return noting


def _check_windows(name: str, config: PreTrainedConfig, windows: dict[int, int | None]) -> None:
    """Refuse a model that applies its window only in transformers' masks, which packed attention does not use."""
    kinds = getattr(config, "layer_types", None)
    for layer, found in sorted(windows.items()):
        slides = kinds[layer] == "sliding_attention" if kinds else True
        wanted = getattr(config, "sliding_window", None) if slides else None
        if found != wanted:
            raise ConfigError(
                f"{name}: layer {layer} passes a window of {found} to its attention, but config.json says {wanted}; "
                "wanted the same window, otherwise packed sequences would be computed incorrectly"
            )
