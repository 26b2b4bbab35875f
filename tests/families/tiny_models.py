"""Tiny random models of the families that people train, in the form in which their checkpoints name themselves.

Each has three layers, so that every kind of layer of a family occurs. Weights are larger than at initialisation:
attention is then far from uniform, and a wrong position, window or scale moves log-probabilities by much more than
rounding does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 320
MAX_POSITIONS = 2048
WINDOW = 64  # shorter than the test's sequences
GAIN = 2.5  # of every matrix over its initialisation, whose own size is set to 1 / sqrt(inputs)

COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """`linears`: names of the linear modules that adapters go to, attention's and the MLP's."""

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = ATTENTION
    mlp: tuple[str, ...] = MLP
    window: bool = False  # some layer sees less than the whole sequence

    def make(self, seed: int = 0) -> PreTrainedModel:
        """The model in float32."""
        config = AutoConfig.for_model(self.model_type, **{**COMMON, **self.config})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2 and "embed" not in name and "lm_head" not in name:
                    weight.normal_(std=GAIN / weight.shape[-1] ** 0.5)
                elif weight.ndim >= 2:
                    weight.normal_(std=1.0 / weight.shape[-1] ** 0.5)
                else:  # norms and biases: not all ones and zeros
                    weight.add_(0.2 * torch.randn_like(weight))
        return model

    def save(self, folder: Path, seed: int = 0) -> Path:
        """A folder as a hub gives it, without tokenizer."""
        self.make(seed).save_pretrained(folder)
        return folder


ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip

DENSE = (
    Family("llama2", "llama", {"num_key_value_heads": 4}),
    Family("llama3", "llama", {"rope_parameters": _LLAMA3}),
    Family("smollm2", "llama", {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    # it has no head_dim of its own, and vLLM on CPU has no attention for heads of 64 / 4
    Family("qwen2", "qwen2", {"tie_word_embeddings": True, "num_attention_heads": 2, "num_key_value_heads": 1}),
    Family("qwen3", "qwen3", {"tie_word_embeddings": True}),
    Family("mistral", "mistral", {"sliding_window": WINDOW}, window=True),
    Family("gemma", "gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    Family(
        "gemma2",
        "gemma2",
        {
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        window=True,
    ),
    Family(
        "gemma3",
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 24},
        window=True,
    ),
    Family("phi3", "phi3", attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj")),
    Family(
        "smollm3",
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    ),
    Family("olmo2", "olmo2"),
    Family(
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.11,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    Family("glm4", "glm4", {"partial_rotary_factor": 0.5}, mlp=("gate_up_proj", "down_proj")),
    Family(
        "cohere2",
        "cohere2",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "logit_scale": 0.25},
        window=True,
    ),
    Family(
        "exaone4",
        "exaone4",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "tie_word_embeddings": True},
        window=True,
    ),
)
MIXTURES = (
    Family(
        "qwen3_moe",
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    Family(
        "gpt_oss",
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": ALTERNATING},
        window=True,
    ),
)
FAMILIES = {family.name: family for family in (*DENSE, *MIXTURES)}
