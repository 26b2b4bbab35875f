"""The text part of a text-and-image checkpoint as a model of text in vLLM.

vLLM's own classes for such checkpoints import what handles images, torchvision among it, though no image ever comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES = {"gemma3": "RlsysGemma3TextPart", "mistral3": "RlsysMistral3TextPart"}  # by the checkpoint's model_type


def register() -> None:
    """Make vLLM know the classes, in each of its processes; again is harmless."""
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES.values():
        name = architecture.removeprefix("Rlsys")
        ModelRegistry.register_model(architecture, f"rlsys.sampler.vllm.text_parts:{name}")


def text_only(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a checkpoint's text part, for ``hf_overrides``."""
    if config.model_type not in ARCHITECTURES:  # vLLM asks with a stand-in first, whether the type would change
        return config
    text = config.get_text_config(decoder=True)
    text.architectures = [ARCHITECTURES[config.model_type]]
    text.tie_word_embeddings = config.tie_word_embeddings
    return text
