"""The learner computes what transformers computes, whatever family a model is of.

The models are those of tiny_models.py: attention far from uniform, so that a wrong position or window is seen.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsys.config import LearnerSection, ModelSection
from rlsys.learner import Learner
from tests.families.tiny_models import FAMILIES, MAX_POSITIONS, VOCAB_SIZE

LONG = 1536  # positions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def folder(name: str) -> Path:
        return FAMILIES[name].save(tmp_path_factory.mktemp(name))

    return folder


def learner_in(path: Path, dtype: str) -> Learner:
    model = ModelSection(path=str(path), dtype=dtype, max_length=MAX_POSITIONS)
    return Learner(path, model, LearnerSection(token_budget=8192))


def draw(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).astype(np.int32)


def by_transformers(path: Path, tokens: np.ndarray, dtype: torch.dtype, kernel: str = "eager") -> np.ndarray:
    """(T - 1,) nats of each token but the first, by transformers as it comes."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=kernel).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logp = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    found: np.ndarray = logp[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    return found


@pytest.mark.parametrize("name", ["llama3", "smollm2", "qwen3"])
def test_in_bfloat16_the_distance_to_transformers_does_not_grow_with_the_position(folders: Any, name: str) -> None:
    """Frequencies of a rotary embedding that are rounded to bfloat16 put late tokens elsewhere. Two kernels of
    transformers' own say how far apart the same bfloat16 model may be."""
    path, tokens = folders(name), draw(LONG)
    found = learner_in(path, "bfloat16").logprobs(None, tokens, np.array([0, LONG]))[1:]
    kernels = {kernel: by_transformers(path, tokens, torch.bfloat16, kernel) for kernel in ("sdpa", "eager")}
    away, theirs = np.abs(found - kernels["sdpa"]), np.abs(kernels["eager"] - kernels["sdpa"])
    for band in (slice(0, 64), slice(64, 512), slice(512, 1024), slice(1024, None)):
        assert away[band].mean() <= 1.25 * theirs[band].mean(), band
    assert away[-256:].mean() < 1.5 * away[64:320].mean()
