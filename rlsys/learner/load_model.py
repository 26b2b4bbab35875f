"""Load a base for training, and write a fully trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rlsys.errors import ConfigError
from rlsys.modeling import attention
from rlsys.modeling.load_checks import check_packing
from rlsys.modeling.rms_norm import replace_norms
from rlsys.modeling.text_part import load_language_model
from rlsys.modeling.vllm_parity import as_published


def load_model(base: Path | str, dtype: torch.dtype, computing: torch.dtype, device: str) -> PreTrainedModel:
    """The frozen base in evaluation mode (no dropout) with packed attention: loaded in `dtype`, then converted to
    `computing`."""
    attention.register()
    model = load_language_model(base, dtype=dtype, attention=attention.NAME)
    model.to(device)
    _convert(model, dtype, computing)
    model.eval()
    model.requires_grad_(False)
    check_packing(model)
    replace_norms(model)
    return model


def decoder_layers(model: PreTrainedModel, key: str) -> Sequence[nn.Module]:
    """The decoder layers, which the configuration key `key` needs.

    Raises:
        ConfigError: the model has no list of them.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"{key}: {type(model).__name__} has no list of decoder layers called 'layers'; wanted a model that has, or "
            f"{key}=false"
        )
    return list(layers)


def save_model(model: PreTrainedModel, dtype: torch.dtype, out: Path) -> None:
    """Write all weights in `dtype` as a Hugging Face folder; the model itself keeps its precision."""
    originals = [(weight, weight.data) for weight in model.parameters()]
    try:
        for weight, values in originals:
            weight.data = values.to(dtype)
        with as_published(model):
            model.save_pretrained(out)
    finally:
        for weight, values in originals:
            weight.data = values


def _convert(model: PreTrainedModel, loaded: torch.dtype, computing: torch.dtype) -> None:
    """Convert tensors of dtype `loaded` to `computing`. Tensors that transformers keeps in another dtype stay: a rotary
    embedding's frequencies, rounded to bfloat16, are off by radians at position 1,000, and a sampler does not round
    them."""
    if loaded == computing:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == loaded:
            tensor.data = tensor.data.to(computing)
