"""Shared code of the GPU checks: sections without pydantic, random bases created on the device, batches, results.

This module and its imports need only torch, transformers and peft (tests/unit/benchmarks/test_gpu_check.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_journal import DONE, FAILED, Journal
from rlsys.datums import DatumBatch
from rlsys.distributed.ranks import ALONE
from rlsys.learner.learner import Learner
from rlsys.learner.runs import RunState
from rlsys.learner.token_budget import TokenBudget
from rlsys.losses import Loss
from rlsys.rollouts import offsets_of, spans
from rlsys.types import Array, BatchResult, Datum, ModelInput

RUN = "run"
QUICK = {  # 0.3 million parameters
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip
UNTIED = {**QUICK, "hidden_size": 96, "tie_word_embeddings": False}
QWEN3_0_6B = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_1_7B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelValues:
    """Stands in for rlsys.config.ModelSection, which needs pydantic; names and defaults are the same."""

    path: str | None = None
    make: None = None
    dtype: str = "float32"
    max_length: int = 128


@dataclass(frozen=True, slots=True)
class LoraValues:
    """For rlsys.config.LoraSection."""

    rank: int = 16
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False


@dataclass(frozen=True, slots=True)
class LearnerValues:
    """For rlsys.config.LearnerSection, without what says where its actors run."""

    device: str = "cpu"
    shard_base: bool = False
    threads: int | None = None
    token_budget: int = 4096
    share_prompts: bool = True
    logprob_chunk_tokens: int = 1024
    gradient_checkpointing: bool = False
    custom_graph_gb: float | None = None
    entropy: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One value compared with its bound; NaN never passes."""

    name: str
    found: float
    bound: float
    sense: Literal["<=", ">="] = "<="
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.found <= self.bound if self.sense == "<=" else self.found >= self.bound


def error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """||found - wanted|| / ||wanted|| over all of them together, in float64 on the CPU."""
    ours, theirs = (torch.cat([part.detach().cpu().double().reshape(-1) for part in side]) for side in (found, wanted))
    return float((ours - theirs).norm() / theirs.norm())


def write_base(folder: Path, shape: dict[str, Any], dtype: str, device: str, max_length: int, spread: float) -> int:
    """A Qwen3 of random weights, made on `device`; says how many parameters it has. `spread` is of the weights.

    No token pads: its embedding would be 0, and a row of zeros multiplies the gradient by 1,000 in every norm, which
    overflows in 28 layers (rlsys/modeling/load_checks.py then refuses the model).
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **shape, max_position_embeddings=max_length, eos_token_id=0, initializer_range=spread, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    with _default(getattr(torch, dtype)), torch.device(device):
        model = Qwen3ForCausalLM(config)
    count = sum(weight.numel() for weight in model.parameters())
    model.save_pretrained(folder)
    return count


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def learner_of(
    base: Path, section: LearnerValues, saved: str, max_length: int, dtype: torch.dtype | None = None,
    lora: LoraValues = LoraValues(), bold: bool = True,
) -> Learner:  # fmt: skip
    """A learner with one run. `bold`: B is large enough to change outputs, and the same on every device."""
    model = ModelValues(path=str(base), dtype=saved, max_length=max_length)
    # The learner reads attributes only; the sections' own classes would need pydantic.
    learner = Learner(base, model, section, dtype=dtype)  # type: ignore[arg-type]
    learner.runs.create(RUN, lora, seed=1)  # type: ignore[arg-type]
    if bold:
        generator = torch.Generator().manual_seed(2)
        state = learner.runs.state(RUN)
        weights = {
            name: _drawn(weight, generator) if name.endswith(".lora_B") else weight.clone()
            for name, weight in sorted(state.weights.items())
        }
        learner.runs.restore(RUN, RunState(0, weights, None))
    return learner


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    return (0.05 * torch.randn(like.shape, generator=generator)).to(like.device, like.dtype)


def settle(learner: Learner, **changed: Any) -> None:
    """Change the settings of a loaded learner, and reset its token budget."""
    # LearnerValues, a dataclass, to which `learner_of` gave the learner's type.
    learner._forward.section = replace(learner._forward.section, **changed)  # type: ignore[type-var]
    learner._forward.budget = TokenBudget(learner._forward.section.token_budget, ALONE)


def gradient(learner: Learner) -> dict[str, Tensor]:
    """The accumulated gradient in float64 on the CPU; cleared in the learner."""
    found = {}
    for name, weight in learner.runs[RUN].parameters.items():
        assert weight.grad is not None, f"{name} has no gradient"
        found[name] = weight.grad.detach().cpu().double()
    learner.runs.forget_gradient(RUN)
    return found


def update(
    learner: Learner, batch: DatumBatch, loss: Loss, where: Literal["all", "weighted"] = "all",
    temperature: float = 1.0, **changed: Any,
) -> tuple[BatchResult, dict[str, Tensor]]:  # fmt: skip
    """One forward_backward under these settings, and its gradient."""
    settle(learner, **changed)
    result = learner.forward_backward(RUN, batch, loss, temperature, where=where)
    return result, gradient(learner)


def groups(prompts: Array, completions: list[Array], vocabulary: int, seed: int = 0) -> DatumBatch:
    """One group per prompt length, with completions of the lengths given for it; prompts have weight 0."""
    random = np.random.default_rng(seed)
    rows, starts = [], []
    for length, of_group in zip(prompts, completions, strict=True):
        prompt = random.integers(1, vocabulary, length)
        rows += [np.concatenate([prompt, random.integers(1, vocabulary, n)]) for n in of_group]
        starts += [int(length) - 1] * len(of_group)
    offsets = offsets_of([len(row) - 1 for row in rows])
    weights = np.zeros(offsets[-1], np.float32)
    lengths = np.concatenate(completions)
    weights[spans(offsets[:-1] + np.array(starts), lengths)] = 1.0
    columns = {
        "weights": weights,
        "logprobs": np.full(offsets[-1], -math.log(vocabulary), np.float32) * weights,
        "advantages": random.normal(size=offsets[-1]).astype(np.float32) * weights,
    }
    tokens, targets = (
        np.concatenate([row[cut] for row in rows]).astype(np.int32) for cut in (slice(-1), slice(1, None))
    )
    return DatumBatch(tokens, targets, offsets, columns)


def near_policy(batch: DatumBatch, logprobs: Array, seed: int = 0) -> DatumBatch:
    """The batch as if its sampler had been near `logprobs`: log-ratios of up to 0.5, none within 0.01 of a bound at
    which ppo and cispo clip, so that rounding clips nothing."""
    random = np.random.default_rng(seed)
    ratios = random.uniform(-0.5, 0.5, len(logprobs))
    for bound in (math.log(0.8), math.log(1.2)):
        ratios = np.where(np.abs(ratios - bound) < 0.01, bound + 0.02, ratios)
    columns = {**batch.columns, "logprobs": ((logprobs - ratios) * batch.columns["weights"]).astype(np.float32)}
    return DatumBatch(batch.tokens, batch.targets, batch.offsets, columns)


def datums_of(batch: DatumBatch) -> list[Datum]:
    cuts = [slice(a, b) for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    return [
        Datum(ModelInput.from_ints(batch.tokens[cut]), {"target_tokens": batch.targets[cut].astype(np.int64)})
        for cut in cuts
    ]


@dataclass(slots=True)
class Report:
    """Records checks as they finish. An exception counts as a failed check."""

    journal: Journal
    checks: list[Check] = field(default_factory=list)

    def run(self, part: str, work: Callable[[], Iterable[Check]]) -> str:
        """Run the work: DONE, or FAILED if a check did not pass or the work raised an error."""
        before = len(self.checks)
        try:
            for check in work():
                self._add(part, check)
        except Exception as caught:  # the others are still worth running
            import traceback

            where = traceback.extract_tb(caught.__traceback__)[-1]
            message = f"{type(caught).__name__}: {str(caught)[:600]} ({Path(where.filename).name}:{where.lineno})"
            self._add(part, Check(part, math.nan, 0.0, "<=", message))
            traceback.print_exc()
        return DONE if all(check.passed for check in self.checks[before:]) else FAILED

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if not check.passed]

    def _add(self, part: str, check: Check) -> None:
        self.checks.append(check)
        more = {"note": check.note} if check.note else {}
        self.journal.fact(
            part, check.name, check.found, bound=check.bound, sense=check.sense, passed=check.passed, **more
        )
