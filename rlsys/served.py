"""What vLLM can serve of a model, told from its config.json before any engine starts. Read in vLLM 0.32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of CPUAttentionBackend
NO_OUTPUT_LAYER = ("cohere", "cohere2", "gemma2")  # vLLM's classes multiply by the embeddings instead: no adapter fits
MOST_UNEMBEDDED = 258_048  # vocabulary of LogitsProcessorWithLoRA


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the language model in a config.json: of a text-and-image checkpoint that of its text part."""
    return {**config, **(config.get("text_config") or {})}


def read_config(folder: Path) -> Mapping[str, Any]:
    """A model folder's config.json; nothing where there is none.

    Raises:
        ConfigError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is no JSON object: {error}") from None


def refuse_unserved(where: str, config: Mapping[str, Any], device: str) -> None:
    """
    Raises:
        ConfigError: vLLM's attention on this device has no kernel for the model's heads, whose engine would die of its
            first request.
    """
    size = _head_size(language_config(config))
    if device == "cpu" and size is not None and size not in CPU_HEAD_SIZES:
        known = ", ".join(map(str, CPU_HEAD_SIZES))
        raise ConfigError(f"model.path: {where} has attention heads of {size}; vLLM on CPU serves {known}")


def why_no_unembedding(config: Mapping[str, Any], device: str) -> str | None:
    """Why vLLM cannot serve adapters of the model's output layer; None where it can."""
    kind, vocabulary = language_config(config).get("model_type"), language_config(config).get("vocab_size") or 0
    if device != "cpu":
        return (
            "vLLM's GPU LoRA has no mapping for the rows of prompt log-probabilities there and would score them wrong"
        )
    if kind in NO_OUTPUT_LAYER:
        return f"vLLM's model of {kind} has no output layer of its own that an adapter could go to"
    if vocabulary > MOST_UNEMBEDDED:
        return f"vLLM serves adapters of output layers of at most {MOST_UNEMBEDDED} tokens; found {vocabulary}"
    return None


def refuse_unembedding(where: str, config: Mapping[str, Any], device: str) -> None:
    """
    Raises:
        ConfigError: adapters of the output layer cannot be served.
    """
    if (reason := why_no_unembedding(config, device)) is not None:
        raise ConfigError(f"lora.train_unembed: {where}: {reason}; set lora.train_unembed=false")


def _head_size(config: Mapping[str, Any]) -> int | None:
    if (size := config.get("head_dim")) is not None:
        return int(size)
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if hidden and heads else None
