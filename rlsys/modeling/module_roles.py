"""Which linear modules of a decoder do what: attention, MLP, unembedding. Found by structure, not by name.

    self_attn.q_proj  .k_proj  .v_proj  .o_proj      attention; Phi-3 has qkv_proj and o_proj
    mlp.gate_proj  .up_proj  .down_proj              MLP; Phi-3 and GLM-4 have gate_up_proj and down_proj
    lm_head                                          unembedding, tied to the embeddings or not

An attention module of transformers says whether it is causal, which no other module does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlsys.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Roles:
    """Module paths by role, in the model's order."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    unembedding: tuple[str, ...]
    experts: str | None = None  # class of a module whose weights are no linear modules, as in a mixture of experts


def roles_of(model: PreTrainedModel) -> Roles:
    """Of a causal language model, with adapters or without.

    Raises:
        ConfigError: there is no list of decoder layers.
    """
    layers, head = decoder_layers(model), model.get_output_embeddings()
    attention, mlp, experts = list[str](), list[str](), None
    for path, module in layers:
        own = [name for name, part in module.named_modules() if hasattr(part, "is_causal")]
        for name, part in _without_adapters(module):
            is_attention = any(name.startswith(f"{one}.") for one in own)
            if is_linear(part):
                (attention if is_attention else mlp).append(f"{path}.{name}")
            elif any(weight.ndim > 2 for weight in part.parameters(recurse=False)):
                experts = type(part).__name__
    unembedding = tuple(path for path, module in model.named_modules() if module is head and is_linear(module))
    return Roles(tuple(attention), tuple(mlp), unembedding, experts)


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(path, layer) of each.

    Raises:
        ConfigError: there is no list of decoder layers.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"model.path: {type(model).__name__} has no list of decoder layers called 'layers'; wanted a decoder-only "
            "language model"
        )
    path = next(name for name, module in model.named_modules() if module is layers)
    return [(f"{path}.{number}", layer) for number, layer in enumerate(layers)]


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can go to it, or has."""
    return isinstance(getattr(module, "get_base_layer", lambda: module)(), nn.Linear)


def names(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Last parts of module paths, each once."""
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def skeleton(config: Any) -> PreTrainedModel:
    """The model that a configuration describes, without memory for weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _without_adapters(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all inside; a layer with adapters is one, whatever it is made of."""
    inside: list[str] = []
    for name, part in module.named_modules():
        if not any(name.startswith(f"{layer}.") for layer in inside):
            yield name, part
        if _has_adapters(part):
            inside.append(name)


def _has_adapters(module: nn.Module) -> bool:
    """Whether PEFT put its layer in the place of the module, which then is that layer's base."""
    return hasattr(module, "get_base_layer")
