"""Fingerprint of a base, which tells whether an adapter belongs to it: its shape, and a hash of its weights.

The hash covers at most SAMPLES values of each parameter, rounded to bfloat16. So it is cheap, and equal for a base that
is loaded in bfloat16, float32 or float64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 1024  # per parameter; further training changes nearly all of them


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    summary: str  # for messages: architecture, vocabulary, hidden size, layers
    shape: str  # hash over the configuration's shape and over every parameter's name and shape
    weights: str  # hash over values


def fingerprint_of(model: PreTrainedModel) -> BaseFingerprint:
    """Fingerprint of a model without adapters."""
    import torch  # a driver reads the fingerprints of checkpoints without torch

    config = model.config
    fields = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    values_of_shape = [
        str(getattr(config, field, None)) for field in (*fields, "num_key_value_heads", "tie_word_embeddings")
    ]
    shape, weights = (
        hashlib.blake2b("/".join(values_of_shape).encode(), digest_size=16),
        hashlib.blake2b(digest_size=16),
    )
    for name, parameter in sorted(model.named_parameters()):
        shape.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, len(values) // SAMPLES)][:SAMPLES].to("cpu", torch.bfloat16).contiguous()
        weights.update(sample.view(torch.uint8).numpy().data)
    kind, vocabulary, hidden, layers, heads = values_of_shape[:5]
    summary = f"{kind}, vocabulary {vocabulary}, hidden size {hidden}, {layers} layers, {heads} heads"
    return BaseFingerprint(summary, shape.hexdigest(), weights.hexdigest())
