"""A random Qwen3 whose vocabulary holds the token ids that the documents use, and a tokenizer for their texts."""

from __future__ import annotations

from pathlib import Path

from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from tests.tiny_qwen3 import tiny_qwen3

MAX_LENGTH = 128
LIVE = 3  # snapshots that the engine of these tests holds
PEAKED = 6.0  # makes a few tokens likely, so that a few samples have something to say about them
TEXTS = ["The capital of France is", " Paris.", " Rome.", "The capital of Italy is", "One plus one is", " two."]


def make(folder: Path) -> None:
    tokenizer = build_tokenizer(TEXTS, 120)
    model = tiny_qwen3(tokenizer, hidden_size=32, max_length=MAX_LENGTH, tie_embeddings=True)
    model.lm_head.weight.data *= PEAKED
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
