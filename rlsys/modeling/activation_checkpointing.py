"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): of a layer only its input is kept, and the layer runs
again in the backward pass. Values and gradients have the same bits; memory falls, time grows by about a forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def keep_inputs_only(layers: Sequence[nn.Module]) -> None:
    """Where gradients are recorded, these layers keep their inputs alone. They may be shared among ranks later."""
    for layer in layers:
        layer.forward = _Recomputed(layer.forward)


class _Recomputed:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # no dropout
