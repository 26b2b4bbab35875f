"""Checkpoints that hold a language model beside towers for images: the text part is trained, without the towers.

    in the whole model                          in the text part
    model.language_model.layers.0.mlp.up_proj   model.layers.0.mlp.up_proj
    lm_head                                     lm_head

Adapters, snapshots and checkpoints use the whole model's names, so that PEFT and vLLM load them onto the whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from rlsys.architectures.families import TEXT_PARTS
from rlsys.errors import ConfigError

_PREFIX = "rlsys_whole_prefix"  # attribute of a text part: what the whole model calls its decoder


def configuration(base: Path | str) -> Any:
    """The whole model's configuration.

    Raises:
        ConfigError: it cannot be read, or it is of a model whose text part is not trained here.
    """
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path: {base} cannot be loaded as a causal language model: {error}") from error
    if is_composite(config) and config.model_type not in TEXT_PARTS:
        raise ConfigError(
            f"model.path: {base} is of model_type {config.model_type!r}, which has more than a language model in it; "
            f"of those rlsys trains the text part of {' and '.join(TEXT_PARTS)}"
        )
    return config


def is_composite(config: Any) -> bool:
    """Whether a language model is only a part of what a configuration describes."""
    return config.get_text_config(decoder=True) is not config


def is_tied(base: Path | str) -> bool | None:
    """Whether a base ties its output layer to its embeddings; None: its configuration is not on this machine."""
    from rlsys.architectures.support import local_config  # wants pydantic, which a learner by itself runs without

    found = local_config(str(base))
    return None if found is None else bool(configuration(Path(found[1]).parent).tie_word_embeddings)


def load_language_model(base: Path | str, *, dtype: torch.dtype | str, attention: str | None = None) -> PreTrainedModel:
    """A checkpoint's causal language model: all of it, or its text part.

    Raises:
        ConfigError: there is none that transformers loads.
    """
    config = configuration(base)
    wanted: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        if not is_composite(config):
            return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **wanted))
        if attention is not None:
            wanted = {"attn_implementation": {"text_config": attention}}
        return text_part(load_whole(base, dtype=dtype, **wanted))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {base} cannot be loaded as a causal language model: {error}") from error


def load_whole(base: Path | str, *, dtype: torch.dtype | str, **wanted: Any) -> PreTrainedModel:
    """A checkpoint with all its parts."""
    kind = AutoModelForImageTextToText if is_composite(configuration(base)) else AutoModelForCausalLM
    return cast(PreTrainedModel, kind.from_pretrained(base, dtype=dtype, **wanted))


def text_part(whole: PreTrainedModel) -> PreTrainedModel:
    """A causal language model of the whole one's decoder and output layer; it shares their weights."""
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    with torch.device("meta"):
        part: PreTrainedModel = AutoModelForCausalLM.from_config(decoder.config)
    setattr(part, part.base_model_prefix, decoder)
    part.set_output_embeddings(head)
    decoder.config.tie_word_embeddings = whole.config.tie_word_embeddings
    part.config = decoder.config  # one for both: whoever changes how the model computes, changes it here
    part.generation_config = whole.generation_config
    path = next(name for name, module in whole.named_modules() if module is decoder)
    setattr(part, _PREFIX, path)
    return part.eval()


def whole_name(model: PreTrainedModel, path: str) -> str:
    """What the whole model calls a module of its text part; of other models the path itself."""
    prefix, inner = getattr(model, _PREFIX, None), f"{model.base_model_prefix}."
    return f"{prefix}.{path.removeprefix(inner)}" if prefix and path.startswith(inner) else path


def is_part(model: PreTrainedModel) -> bool:
    """Whether it is a text part."""
    return hasattr(model, _PREFIX)
