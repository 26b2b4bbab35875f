"""Creates a base model with random weights: ``initial_model`` writes a random Qwen3 in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from rlsys.config import MakeSection
from rlsys.errors import ConfigError
from rlsys.utils.atomic_files import new_folder

ROPE_THETA, TIED_EMBEDDINGS = 10_000.0, True  # of a base trained from scratch


def initial_model(make: MakeSection, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int, out: Path) -> None:
    """Write a random fp32 Qwen3 with these dimensions and its tokenizer to the new folder `out`.

    The vocabulary size is the tokenizer's, which can be smaller than ``make.vocab_size``: otherwise ids without a token
    could be sampled.
    """
    if make.num_heads % make.num_kv_heads:
        raise ConfigError(
            f"model.make.num_heads: found {make.num_heads}; wanted a multiple of num_kv_heads {make.num_kv_heads}"
        )
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=make.hidden_size,
        num_hidden_layers=make.num_layers,
        num_attention_heads=make.num_heads,
        num_key_value_heads=make.num_kv_heads,
        head_dim=make.head_dim,
        intermediate_size=make.intermediate_size,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=max_length,
        tie_word_embeddings=TIED_EMBEDDINGS,
        dtype="float32",
        **ends,
    )
    with torch.random.fork_rng(devices=[]), new_folder(out) as folder:
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        model.generation_config = GenerationConfig(**ends)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
