"""A learner of a family's tiny model with one run whose adapter is large, and what plain transformers says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsys.architectures.model_shape import read_config
from rlsys.architectures.support import serves_unembedding
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.learner.adapter_checkpoint import save_run
from rlsys.learner.learner import Learner
from rlsys.modeling.text_part import load_language_model
from rlsys.modeling.vllm_parity import match_sampler
from rlsys.types import Array
from tests.families.tiny_composites import COMPOSITES, Composite
from tests.families.tiny_models import FAMILIES, MIXTURES, VOCAB_SIZE, Family

LENGTH = 640  # far beyond the windows of 64
TOKENS = np.random.default_rng(0).integers(8, VOCAB_SIZE, LENGTH).astype(np.int32)
OFFSETS = np.array([0, LENGTH])
MODELS: dict[str, Family | Composite] = {**FAMILIES, **{composite.name: composite for composite in COMPOSITES}}
GOAL = 1e-5  # nats, of one token in float32
# times what float32 itself strays from float64 within transformers on the base. Merged weights were seen at 3.7 of it;
# a wrong window or scale moves tokens by 1,000 times as much.
NOISE = 8.0


@dataclass(frozen=True, slots=True)
class Adapted:
    """Run "run" is of all that can be trained and "inner" of the layers alone, each with a B that is not zero. Both are
    saved in `checkpoints`."""

    family: Family | Composite
    folder: Path
    model: ModelSection
    learner: Learner
    checkpoints: Path
    bound: float  # nats, between two programs that compute the same in float32

    def logprobs(self, run_id: str | None) -> Array:
        """(LENGTH - 1,) of the tokens but the first, by the learner."""
        return self.learner.logprobs(run_id, TOKENS, OFFSETS)[1:]


def adapted(name: str, place: Path) -> Adapted:
    family = MODELS[name]
    folder = family.save(place / "base")
    model = ModelSection(path=str(folder), max_length=LENGTH)
    learner = Learner(folder, model, LearnerSection())
    serves_output = serves_unembedding(read_config(folder), "cpu")
    lora = LoraSection(rank=8, alpha=16.0, train_mlp=family not in MIXTURES, train_unembed=serves_output)
    draw = torch.Generator().manual_seed(2)
    for run, section in (("run", lora), ("inner", lora.model_copy(update={"train_unembed": False}))):
        learner.runs.create(run, section, seed=1)
        for key, weight in learner.runs.state(run).weights.items():
            if key.endswith("lora_B"):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))
        save_run(learner, run, place / "checkpoints" / run, with_optimizer=False)
    plain = {
        dtype: load_language_model(folder, dtype=dtype, attention="eager") for dtype in (torch.float32, torch.float64)
    }
    error = distance(*(logprobs_of(one) for one in plain.values()))
    return Adapted(family, folder, model, learner, place / "checkpoints", max(GOAL, NOISE * error))


def logprobs_of(model: Any) -> Array:
    """(LENGTH - 1,) of the tokens but the first, by plain transformers, which is told where vLLM computes otherwise."""
    match_sampler(model, LENGTH)
    model.config._experts_implementation = "eager"  # torch's grouped product has no float64
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.from_numpy(TOKENS[None]).long()).logits[0, :-1]
    targets = torch.from_numpy(TOKENS[1:]).long()
    found: Array = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])[:, 0].numpy()
    return found


def distance(a: Array, b: Array) -> float:
    """Of the token that differs most."""
    return float(np.abs(np.asarray(a, np.float64) - b).max())
