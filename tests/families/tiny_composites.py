"""Tiny random checkpoints of text and images, as tests/families/tiny_models.py makes those of text alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.families.tiny_models import ALTERNATING, COMMON, GAIN, WINDOW

_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True)
class Composite:
    """`text` and `vision`: sections of the configuration; the tower's layers are called as those of the text part."""

    name: str
    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    config: Mapping[str, Any]

    def make(self, seed: int = 0) -> PreTrainedModel:
        """The model in float32."""
        config = AutoConfig.for_model(
            self.model_type,
            text_config={**COMMON, **self.text},
            vision_config={**_TOWER, **self.vision},
            **self.config,
        )
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2:
                    is_end = "embed" in name or "lm_head" in name
                    weight.normal_(std=(1.0 if is_end else GAIN) / weight.shape[-1] ** 0.5)
                else:
                    weight.add_(0.2 * torch.randn_like(weight))
        return model

    def save(self, folder: Path, seed: int = 0) -> Path:
        """A folder as a hub gives it, without tokenizer and image processor."""
        self.make(seed).save_pretrained(folder)
        return folder


COMPOSITES = (
    Composite(
        "gemma3_mm",
        "gemma3",
        {
            "model_type": "gemma3_text",
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 24,
        },
        {"model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7},
    ),
    Composite(
        "mistral3",
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "head_dim": 16},
        {"image_token_index": 5, "tie_word_embeddings": False},
    ),
)
