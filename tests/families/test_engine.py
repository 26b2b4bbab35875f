"""On a tiny model of each family: the learner, vLLM's CPU engine, plain transformers with PEFT, and a merged model agree.

Each family has an engine process of its own, which ends before the next begins.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from rlsys.checkpoints import save_run
from rlsys.config import LearnerSection, LoraSection, ModelSection, SamplerSection
from rlsys.errors import ConfigError
from rlsys.export import export_adapter, export_merged
from rlsys.learner import Learner
from rlsys.sampler import Sampler, prepare_environment
from rlsys.served import read_config, why_no_unembedding
from rlsys.text_part import load_language_model, load_whole
from rlsys.types import Array
from rlsys.weights import WeightUpdate
from tests.families.tiny_models import FAMILIES, MIXTURES, VOCAB_SIZE, Family

LENGTH = 640  # far beyond the windows of 64
SECTION = SamplerSection(
    kv_cache_gb=0.1, max_num_seqs=16, max_num_batched_tokens=1024, max_lora_rank=8, max_live_adapters=2
)
GOAL = 1e-5  # nats
NOISE = 4.0  # times the error of float32 in one of two programs, where a family's is above the goal
TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, LENGTH).astype(np.int32)
OFFSETS = np.array([0, LENGTH])
Run = Callable[[Coroutine[Any, Any, Any]], Any]

prepare_environment(SECTION)


@dataclass(frozen=True, slots=True)
class Served:
    """A family's model in a learner with one run "run" whose B is large, and in an engine that serves it as version 1."""

    family: Family
    folder: Path
    learner: Learner
    sampler: Sampler
    checkpoint: Path
    bound: float  # nats, between two programs in float32


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family, place = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    folder = family.save(place / "base")
    model = ModelSection(path=str(folder), max_length=LENGTH)
    learner = Learner(folder, model, LearnerSection())
    learner.create_run("run", section_for(family, folder), seed=1)
    draw = torch.Generator().manual_seed(2)
    for name, weight in learner.run_state("run").weights.items():
        if name.endswith("lora_B"):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    save_run(learner, "run", place / "checkpoint", with_optimizer=False)
    sampler = Sampler(name=family.name, base=folder, model=model, section=SECTION, seed=1)
    run(sampler.start())
    exact = logprobs_of(load_language_model(folder, dtype=torch.float64, attention="eager"))
    error = np.abs(logprobs_of(load_language_model(folder, dtype=torch.float32, attention="eager")) - exact).max()
    yield Served(family, folder, learner, sampler, place / "checkpoint", max(GOAL, NOISE * float(error)))
    run(sampler.stop())


def section_for(family: Family, folder: Path) -> LoraSection:
    """All that can be trained and served."""
    serves_output = why_no_unembedding(read_config(folder), "cpu") is None
    return LoraSection(rank=8, alpha=16.0, train_mlp=family not in MIXTURES, train_unembed=serves_output)


def logprobs_of(model: Any) -> Array:
    """(LENGTH - 1,) of the tokens but the first, by plain transformers."""
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.from_numpy(TOKENS[None]).long()).logits[0, :-1]
    targets = torch.from_numpy(TOKENS[1:]).long()
    found: Array = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])[:, 0].numpy()
    return found


def learned(served: Served, run_id: str | None) -> Array:
    return served.learner.logprobs(run_id, TOKENS, OFFSETS)[1:]


def distance(a: Array, b: Array) -> float:
    return float(np.abs(np.asarray(a, np.float64) - b).max())


def test_the_engine_scores_as_the_learner_does_without_and_with_an_adapter(served: Served, run: Run) -> None:
    base, ours = learned(served, None), learned(served, "run")
    snapshot = served.learner.snapshot("run", "float32")
    canary = TOKENS[:64]
    run(served.sampler.load(WeightUpdate(snapshot, canary, ours[:63], base[:63], bound=1e-3)))
    (version,) = (version for _, version in served.sampler.stats().live)
    found = {which: run(served.sampler.logprobs(TOKENS, OFFSETS, *which))[1:] for which in ((None, -1), ("run", version))}
    assert distance(found[None, -1], base) < served.bound
    assert distance(found["run", version], ours) < served.bound
    assert np.abs(ours - base).mean() > 1000 * served.bound, "the adapter has to be large"


def test_peft_loads_the_saved_adapter_onto_the_model(served: Served) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        whole = load_whole(served.folder, dtype=torch.float32, attn_implementation="eager")
        model = PeftModel.from_pretrained(whole, served.checkpoint)
    assert distance(logprobs_of(model), learned(served, "run")) < served.bound


def test_vllm_s_own_loader_takes_the_exported_adapter(served: Served, run: Run, tmp_path: Path) -> None:
    export_adapter(served.checkpoint, tmp_path / "adapter", for_vllm=True)
    found = run(scored_by_vllm(served.sampler, tmp_path / "adapter"))
    assert distance(found, learned(served, "run")) < served.bound


async def scored_by_vllm(sampler: Sampler, adapter: Path) -> Array:
    """(LENGTH - 1,) under an adapter that vLLM loads from its folder, as its server does."""
    from vllm.lora.request import LoRARequest

    from rlsys.engine.requests import score_params

    request = LoRARequest(lora_name="plain", lora_int_id=1000, lora_path=str(adapter))
    prompt = {"type": "token", "prompt_token_ids": TOKENS.tolist()}
    output = None
    async for output in sampler._engine.generate(prompt, score_params(), "plain", lora_request=request):
        pass
    assert output is not None
    return np.asarray(output.prompt_logprobs.logprobs, np.float32)


def test_a_merged_model_is_base_and_adapter(served: Served, tmp_path: Path) -> None:
    export_merged(served.folder, served.checkpoint, tmp_path / "merged")
    model = load_whole(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    assert distance(logprobs_of(model), learned(served, "run")) < served.bound


@pytest.mark.parametrize("family", MIXTURES, ids=lambda family: family.name)
def test_experts_are_refused_with_the_way_out(family: Family, tmp_path: Path) -> None:
    folder = family.save(tmp_path / "base")
    learner = Learner(folder, ModelSection(path=str(folder), max_length=LENGTH), LearnerSection())
    with pytest.raises(ConfigError, match=r"is a mixture of experts .* set lora\.train_mlp=false"):
        learner.create_run("run", LoraSection(), seed=1)
