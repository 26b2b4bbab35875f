"""Text part of multimodal checkpoints: the language model is trained without the vision towers.

    name in the complete model                  name in the text part
    model.language_model.layers.0.mlp.up_proj   model.layers.0.mlp.up_proj
    lm_head                                     lm_head

Adapters, snapshots and checkpoints use the names of the complete model, so that PEFT and vLLM can load them onto it.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlsys.architectures.families import TEXT_PARTS
from rlsys.errors import ConfigError

_PREFIX = "rlsys_whole_prefix"  # attribute of a text part: path of its decoder in the complete model


def configuration(base: Path | str) -> PreTrainedConfig:
    """Load the configuration of the complete model.

    Raises:
        ConfigError: it cannot be read, or the text part of such a model is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path: {base} cannot be loaded as a causal language model: {error}") from error
    if is_composite(config) and config.model_type not in TEXT_PARTS:
        raise ConfigError(
            f"model.path: {base} has model_type {config.model_type!r}, a multimodal model; of these rlsys can train "
            f"the text part of {' and '.join(TEXT_PARTS)}"
        )
    return config


def is_composite(config: PreTrainedConfig) -> bool:
    """Whether the configuration is of a multimodal model, which contains a language model."""
    return config.get_text_config(decoder=True) is not config


def is_tied(base: Path | str) -> bool | None:
    """Whether a base ties its output layer to its embedding; None: its configuration is not on this machine."""
    from rlsys.architectures.support import local_config  # imports pydantic, which a learner alone does not need

    found = local_config(str(base))
    return None if found is None else bool(configuration(Path(found[1]).parent).tie_word_embeddings)


def load_language_model(base: Path | str, *, dtype: torch.dtype | str, attention: str | None = None) -> PreTrainedModel:
    """Load a checkpoint's causal language model, or the text part of a multimodal one.

    Raises:
        ConfigError: transformers cannot load a language model from it.
    """
    config = configuration(base)
    wanted: dict[str, object] = {} if attention is None else {"attn_implementation": attention}
    try:
        if not is_composite(config):
            return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **wanted))
        if attention is not None:
            wanted = {"attn_implementation": {"text_config": attention}}
        return text_part(load_whole(base, dtype=dtype, **wanted))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {base} cannot be loaded as a causal language model: {error}") from error


def load_whole(base: Path | str, *, dtype: torch.dtype | str, **wanted: object) -> PreTrainedModel:
    """Load a checkpoint with all its parts."""
    kind = AutoModelForImageTextToText if is_composite(configuration(base)) else AutoModelForCausalLM
    return cast(PreTrainedModel, kind.from_pretrained(base, dtype=dtype, **wanted))


def text_part(whole: PreTrainedModel) -> PreTrainedModel:
    """Build a causal language model from the decoder and the output layer of a multimodal model, sharing its
    weights."""
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    with torch.device("meta"):
        part: PreTrainedModel = AutoModelForCausalLM.from_config(decoder.config)
    setattr(part, part.base_model_prefix, decoder)
    part.set_output_embeddings(head)
    decoder.config.tie_word_embeddings = whole.config.tie_word_embeddings
    part.config = decoder.config  # shared with the decoder, so that changes to the configuration take effect
    part.generation_config = whole.generation_config
    path = next(name for name, module in whole.named_modules() if module is decoder)
    setattr(part, _PREFIX, path)
    return part.eval()


def whole_name(model: PreTrainedModel, path: str) -> str:
    """Path of a text part's module in the complete model; for other models the path itself."""
    prefix, inner = getattr(model, _PREFIX, None), f"{model.base_model_prefix}."
    return f"{prefix}.{path.removeprefix(inner)}" if prefix and path.startswith(inner) else path


def is_part(model: PreTrainedModel) -> bool:
    """Whether the model is the text part of a multimodal one."""
    return hasattr(model, _PREFIX)
