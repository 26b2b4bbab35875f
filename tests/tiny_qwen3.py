"""A random Qwen3 of two layers, for tests whose documents name token ids of a large vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

VOCAB = 40_960  # holds the token ids of the documents


def tiny_qwen3(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, max_length: int, tie_embeddings: bool
) -> Qwen3ForCausalLM:
    """The same weights in every call."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie_embeddings,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Qwen3ForCausalLM(config)
