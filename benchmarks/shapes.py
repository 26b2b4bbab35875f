"""Random models for the benchmarks, as Hugging Face folders without a real tokenizer: prompts are token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlsys.architectures.precision import multiplies_bfloat16

# Qwen3 of 54 million parameters with its own vocabulary; its body (38 million) is the same under a larger one.
S54 = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_000,
}  # fmt: skip
# 2.9 million.
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048,
}  # fmt: skip
QWEN_VOCABULARY = 151_936
# Where the CPU has no kernels for bfloat16, what transformers does in it takes hours.
DTYPE = "bfloat16" if multiplies_bfloat16() else "float32"
DTYPES = list(dict.fromkeys((DTYPE, "float32")))


def write_model(folder: Path, shape: dict[str, int], dtype: str = "bfloat16", max_length: int = 2048) -> int:
    """Write the model and say how many parameters it has."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {"tie_word_embeddings": True, "eos_token_id": 0, "pad_token_id": 0}
    config = Qwen3Config(**shape, **settings, max_position_embeddings=max_length, dtype=dtype)
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(shape["vocab_size"])}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0").save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())
