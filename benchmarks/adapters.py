"""Random LoRA adapters for random models, as snapshots and as folders that stock vLLM can load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rlsys.data.problems import Problem, ProblemSet, encode
from rlsys.weight_sync.tensors import snapshot_of, tensors_of
from rlsys.weight_sync.update import AdapterSnapshot


def random_snapshot(
    base: Path, run_id: str, version: int, rank: int, dtype: str, size: float = 0.02
) -> AdapterSnapshot:
    """An adapter on the seven linear modules of each layer. `size`: scale of B; 0: an untrained adapter."""
    from transformers import AutoModelForCausalLM

    tensors = {}
    for name, module in AutoModelForCausalLM.from_pretrained(base).named_modules():
        if name.endswith("_proj"):
            out, inside = module.weight.shape
            tensors[f"{name}.lora_A"] = torch.randn(rank, inside) * 0.02
            tensors[f"{name}.lora_B"] = torch.randn(out, rank) * size
    return snapshot_of(run_id, version, rank, tensors, dtype)


def write_adapter(snapshot: AdapterSnapshot, folder: Path) -> None:
    """In PEFT's format."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{name}.weight": tensor.clone() for name, tensor in tensors_of(snapshot).items()}
    targets = sorted({slot.name.split(".")[-2] for slot in snapshot.layout})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": snapshot.rank, "lora_alpha": snapshot.rank,
        "target_modules": targets, "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def random_problems(count: int, tokens: int, vocab_size: int) -> ProblemSet:
    draw = np.random.default_rng(0)
    return encode([Problem("random tokens", "")] * count, lambda _: draw.integers(2, vocab_size, tokens).tolist())
