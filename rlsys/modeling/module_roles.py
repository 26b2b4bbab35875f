"""Roles of a decoder's linear modules: attention, MLP, unembedding. Determined by structure, not by name.

    self_attn.q_proj  .k_proj  .v_proj  .o_proj      attention; Phi-3 has qkv_proj and o_proj
    mlp.gate_proj  .up_proj  .down_proj              MLP; Phi-3 and GLM-4 have gate_up_proj and down_proj
    lm_head                                          unembedding, tied to the embeddings or not

Attention modules are recognised by the attribute ``is_causal``, which only attention modules of transformers have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlsys.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Roles:
    """Module paths by role, in the model's order."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    unembedding: tuple[str, ...]
    experts: str | None = None  # class of a module with stacked weights instead of linear modules (mixture of experts)


def roles_of(model: PreTrainedModel) -> Roles:
    """Roles of the linear modules of a causal language model, with or without adapters.

    Raises:
        ConfigError: the model has no list of decoder layers.
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
    """(path, layer) of each decoder layer.

    Raises:
        ConfigError: the model has no list of decoder layers.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"model.path: {type(model).__name__} has no list of decoder layers named 'layers'; wanted a decoder-only "
            "language model"
        )
    path = next(name for name, module in model.named_modules() if module is layers)
    return [(f"{path}.{number}", layer) for number, layer in enumerate(layers)]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, with or without an adapter."""
    return isinstance(getattr(module, "get_base_layer", lambda: module)(), nn.Linear)


def names(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Last parts of module paths, without duplicates."""
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device, without memory for weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _without_adapters(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all submodules. A LoRA layer counts as one module; its parts are skipped."""
    inside: list[str] = []
    for name, part in module.named_modules():
        if not any(name.startswith(f"{layer}.") for layer in inside):
            yield name, part
        if _has_adapters(part):
            inside.append(name)


def _has_adapters(module: nn.Module) -> bool:
    """Whether the module is a LoRA layer of PEFT, which wraps the original module."""
    return hasattr(module, "get_base_layer")
