"""Which base an adapter belongs to: its shape, and a fingerprint of its weights.

The fingerprint is over at most SAMPLES values of each parameter, rounded to bfloat16, so that it is cheap and the same
for a base that is loaded in bfloat16, float32 or float64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

SAMPLES = 1024  # of one parameter: a base that was trained any further differs in nearly all of them


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    summary: str  # for people: architecture, vocabulary, hidden size, layers
    shape: str  # hash over the configuration's shape and over every parameter's name and shape
    weights: str  # hash over values


def fingerprint_of(model: PreTrainedModel) -> BaseFingerprint:
    """Of a model without adapters."""
    config = model.config
    fields = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    facts = [str(getattr(config, field, None)) for field in (*fields, "num_key_value_heads", "tie_word_embeddings")]
    shape, weights = hashlib.blake2b("/".join(facts).encode(), digest_size=16), hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        shape.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, len(values) // SAMPLES)][:SAMPLES].to("cpu", torch.bfloat16).contiguous()
        weights.update(sample.view(torch.uint8).numpy().data)
    kind, vocabulary, hidden, layers, heads = facts[:5]
    summary = f"{kind}, vocabulary {vocabulary}, hidden size {hidden}, {layers} layers, {heads} heads"
    return BaseFingerprint(summary, shape.hexdigest(), weights.hexdigest())
