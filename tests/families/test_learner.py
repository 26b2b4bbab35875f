"""The learner computes what transformers computes, whatever family a model is of.

The models are those of tiny_models.py: attention far from uniform, so that a wrong position or window is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlsys import losses
from rlsys.config import LearnerSection, ModelSection
from rlsys.datums import DatumBatch
from rlsys.distributed.ranks import ALONE
from rlsys.errors import ConfigError
from rlsys.learner.learner import Learner
from rlsys.learner.runs import BASE_RUN
from rlsys.learner.token_budget import TokenBudget
from tests.families.tiny_models import DENSE, FAMILIES, MAX_POSITIONS, VOCAB_SIZE, WINDOW

LENGTH, LONG = 700, 1536  # positions
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    @cache
    def folder(name: str) -> Path:
        return FAMILIES[name].save(tmp_path_factory.mktemp(name))

    return folder


def learner_in(
    path: Path, dtype: str, trainable: Literal["lora", "all"] = "lora", *, checkpointing: bool = False
) -> Learner:
    model = ModelSection(path=str(path), dtype=dtype, max_length=MAX_POSITIONS)
    section = LearnerSection(token_budget=8192, gradient_checkpointing=checkpointing)
    return Learner(path, model, section, trainable)


def draw(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).astype(np.int32)


def by_transformers(path: Path, tokens: np.ndarray, dtype: torch.dtype, kernel: str = "eager") -> np.ndarray:
    """(T - 1,) nats of each token but the first, by transformers as it comes; Cohere 2 with the window that it was
    trained with, as vLLM has it."""
    config = AutoConfig.from_pretrained(path)
    if config.model_type == "cohere2":
        config.sliding_window += 1
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, attn_implementation=kernel).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logp = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    found: np.ndarray = logp[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_in_float32_it_is_transformers(folders: Folders, name: str) -> None:
    """A sequence of eleven windows. Large weights carry rounding far: a mixture of experts ends 1e-4 apart at most, a
    dense model 6e-5, and both 6e-6 on the mean; transformers itself is as far from its float64."""
    path, tokens = folders(name), draw(LENGTH)
    found = learner_in(path, "float32").logprobs(None, tokens, np.array([0, LENGTH]))[1:]
    theirs = by_transformers(path, tokens, torch.float32)
    away = np.abs(found - theirs)
    assert away.mean() < 1e-5 and away.max() < 3e-4
    if FAMILIES[name] in DENSE:  # transformers computes experts in float32 at most
        exact = by_transformers(path, tokens, torch.float64)
        assert np.abs(found - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


def batch_of(rows: Sequence[np.ndarray], prompts: Sequence[int]) -> DatumBatch:
    """The rows, of whose targets those after the prompt count."""
    offsets = np.concatenate([[0], np.cumsum([len(row) - 1 for row in rows])]).astype(np.int64)
    random = np.random.default_rng(1)
    weights = np.concatenate([np.arange(1, len(row)) >= prompt for row, prompt in zip(rows, prompts, strict=True)])
    columns = {
        "weights": weights.astype(np.float32),
        "logprobs": random.uniform(-6, -1, offsets[-1]).astype(np.float32),
        "advantages": random.normal(size=offsets[-1]).astype(np.float32),
    }
    tokens, targets = (np.concatenate([row[cut] for row in rows]) for cut in (slice(-1), slice(1, None)))
    return DatumBatch(tokens, targets, offsets, columns)


def groups() -> DatumBatch:
    """A prompt longer than the window and one that is shorter, each with completions that leave it behind and that do
    not, and one sequence by itself."""
    rows, prompts = [], []
    for length, own in ((WINDOW + 30, (3, 40, WINDOW + 10)), (WINDOW // 2, (10, WINDOW, 2 * WINDOW)), (20, (100,))):
        prompt = draw(length, seed=length)
        rows += [np.concatenate([prompt, draw(n, seed=n)]) for n in own]
        prompts += [length] * len(own)
    return batch_of(rows, prompts)


def update(learner: Learner, batch: DatumBatch, budget: int, *, share: bool) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Log-probabilities, and the gradient of every weight."""
    learner._forward.section = LearnerSection(share_prompts=share, token_budget=budget)
    learner._forward.budget = TokenBudget(budget, ALONE)
    result = learner.forward_backward(BASE_RUN, batch, losses.resolve("importance_sampling"))
    found = {name: weight.grad.clone() for name, weight in learner.runs[BASE_RUN].parameters.items()}  # type: ignore[union-attr]
    learner.runs.forget_gradient(BASE_RUN)
    return result.logprobs, found


@pytest.mark.parametrize("name", FAMILIES)
def test_packing_and_sharing_prompts_change_neither_values_nor_gradients(folders: Folders, name: str) -> None:
    learner, batch = learner_in(folders(name), "float32", "all"), groups()
    wanted, gradient = update(learner, batch, 1, share=False)  # each sequence by itself
    norm = torch.stack([value.norm() for value in gradient.values()]).norm()
    for budget, share in ((4096, False), (4096, True), (200, True)):
        found, of_found = update(learner, batch, budget, share=share)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
        away = torch.stack([(of_found[key] - gradient[key]).norm() for key in gradient]).norm()
        assert away < 1e-5 * norm, f"{float(away / norm):.1e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_layers_have_the_same_gradients(folders: Folders, name: str) -> None:
    path, batch = folders(name), groups()
    wanted = update(learner_in(path, "float32", "all"), batch, 4096, share=True)[1]
    found = update(learner_in(path, "float32", "all", checkpointing=True), batch, 4096, share=True)[1]
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_decoding_takes_the_likeliest_token_past_the_window(folders: Folders, name: str) -> None:
    learner = learner_in(folders(name), "float32")
    prompts = [draw(WINDOW - 4), draw(WINDOW + 20, seed=1)]
    for prompt, completion in zip(prompts, learner.greedy(prompts, 12, [2]), strict=True):
        for at in (0, len(completion) - 1):
            tokens = np.concatenate([prompt, completion[:at]])
            rows = np.append(np.tile(tokens, (VOCAB_SIZE, 1)), np.arange(VOCAB_SIZE)[:, None], axis=1)
            offsets = np.arange(VOCAB_SIZE + 1) * rows.shape[1]
            only = offsets[1:] - 1
            logp = learner.logprobs(None, rows.reshape(-1).astype(np.int32), offsets, only=only)
            assert logp[only].argmax() == completion[at]


@pytest.mark.parametrize("name", ["llama3", "smollm2", "qwen3", "mistral", "gemma3"])
def test_in_bfloat16_the_distance_to_transformers_does_not_grow_with_the_position(
    folders: Folders, name: str, tmp_path: Path
) -> None:
    """Frequencies of a rotary embedding that are rounded to bfloat16 put late tokens elsewhere. Two kernels of
    transformers' own say how far apart the same bfloat16 model may be."""
    path, tokens = folders(name), draw(LONG)
    learner = learner_in(path, "bfloat16")
    found = learner.logprobs(None, tokens, np.array([0, LONG]))[1:]
    if learner.computing_dtype == "float32":  # this CPU has no kernels for bfloat16: its values, exactly
        values = tmp_path / "values"
        FAMILIES[name].make().to(torch.bfloat16).save_pretrained(values)
        assert np.abs(found - by_transformers(values, tokens, torch.float32)).max() < 3e-4
        return
    kernels = {kernel: by_transformers(path, tokens, torch.bfloat16, kernel) for kernel in ("sdpa", "eager")}
    away, theirs = np.abs(found - kernels["sdpa"]), np.abs(kernels["eager"] - kernels["sdpa"])
    for band in (slice(0, 64), slice(64, 512), slice(512, 1024), slice(1024, None)):
        assert away[band].mean() <= 1.25 * theirs[band].mean(), band
    assert away[-256:].mean() < 1.5 * away[64:320].mean()


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip


def stretched(folder: Path, rope: dict[str, Any], name: str = "phi3") -> Path:
    """The family with this rotary embedding."""
    family = FAMILIES[name]
    config = {**family.config, "head_dim": 16, "rope_parameters": rope, "original_max_position_embeddings": 512}
    return replace(family, config=config).save(folder)


@pytest.mark.parametrize(("max_length", "length"), [(511, 300), (512, 300), (600, 300), (600, 590)])
def test_factors_of_a_longrope_go_by_what_the_engine_may_be_given_and_not_by_the_pack(
    tmp_path: Path, max_length: int, length: int
) -> None:
    """transformers goes by the longest sequence it sees; an engine for 512 tokens has room for 513."""
    path, tokens = stretched(tmp_path, LONGROPE), draw(length)
    factors = LONGROPE["long_factor" if max_length > 511 else "short_factor"]
    fixed = stretched(tmp_path / "fixed", {**LONGROPE, "short_factor": factors, "long_factor": factors})
    model = ModelSection(path=str(path), dtype="float32", max_length=max_length)
    learner = Learner(path, model, LearnerSection(token_budget=8192))
    other = draw(max_length, seed=1)
    both, offsets = np.concatenate([tokens, other]), np.array([0, length, length + max_length])
    found = learner.logprobs(None, both, offsets)[1:length]
    assert np.abs(found - by_transformers(fixed, tokens, torch.float32)).max() < 3e-4


def test_a_rotary_embedding_that_grows_with_the_sequence_is_refused(tmp_path: Path) -> None:
    path = stretched(tmp_path, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, "llama2")
    with pytest.raises(ConfigError, match="rotary embedding of type 'dynamic'"):
        learner_in(path, "float32")


def test_cohere_2_is_saved_with_the_window_it_came_with(folders: Folders, tmp_path: Path) -> None:
    learner = learner_in(folders("cohere2"), "float32", "all")
    learner.save_model(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").sliding_window == WINDOW
    again, tokens = learner_in(tmp_path / "saved", "float32"), draw(200)
    ends = np.array([0, 200])
    np.testing.assert_array_equal(again.logprobs(None, tokens, ends), learner.logprobs(None, tokens, ends))
