"""What autograd keeps of each family, as `rlsys plan` predicts it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlsys import losses
from rlsys.architectures.model_shape import model_shape
from rlsys.config import parse_config
from rlsys.datums import DatumBatch
from rlsys.learner.learner import Learner
from rlsys.planning.memory import activations, adapter_parameters
from tests.families.tiny_models import FAMILIES, Family

LENGTHS = (66, 65, 64, 63, 62, 61, 60)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_activations_are_what_autograd_keeps(
    family: Family, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 %; the heap's slack is no tensor's. And the learner's adapters are as many numbers as predicted."""
    monkeypatch.setattr("rlsys.planning.memory.HEAP_SLACK", 1.0)
    family.save(tmp_path)
    mixture = bool(family.config.get("num_experts_per_tok"))
    job = f"run: {{name: a}}\nmodel: {{path: {tmp_path}, dtype: {dtype}}}\nlora: {{train_mlp: {not mixture}}}"
    config = parse_config(job)
    learner, dims = Learner(tmp_path, config.model, config.learner), model_shape(config.model)
    learner.runs.create("a", config.lora, 0)
    own = [*learner._model.parameters(), *learner._model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    tokens = int(offsets[-1])
    ids = np.random.default_rng(0).integers(3, 300, tokens).astype(np.int32)  # nothing begins alike
    columns = {name: np.ones(tokens, np.float32) for name in ("logprobs", "advantages", "weights")}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = DatumBatch(ids, ids, offsets, columns)
        learner.forward_backward("a", batch, losses.resolve("importance_sampling", {}))
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert activations(config, dims, tokens) == pytest.approx(found, rel=0.05)
    assert sum(p.numel() for p in learner.runs["a"].parameters.values()) == adapter_parameters(config.lora, dims)
