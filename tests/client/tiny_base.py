"""A random Qwen3 whose vocabulary holds the token ids that the documents use, and a tokenizer for their texts."""

from __future__ import annotations

from pathlib import Path

import torch

from rlsys.bootstrap.bpe_tokenizer import build_tokenizer

VOCAB, MAX_LENGTH = 40_960, 128
LIVE = 3  # snapshots that the engine of these tests holds
PEAKED = 6.0  # makes a few tokens likely, so that a few samples have something to say about them
TEXTS = ["The capital of France is", " Paris.", " Rome.", "The capital of Italy is", "One plus one is", " two."]


def make(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer(TEXTS, 120)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=MAX_LENGTH,
                tie_word_embeddings=True,
                initializer_range=0.1,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                dtype="float32",
            )
        )
        model.lm_head.weight.data *= PEAKED
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
