"""Learners of tiny models, batches for them, what their runs hold, and what plain transformers says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.datums import DatumBatch
from rlsys.distributed.ranks import ALONE
from rlsys.learner.learner import Learner
from rlsys.learner.token_budget import TokenBudget
from rlsys.types import Datum, ModelInput

Models = Callable[[bool], Path]
ALL_TARGETS = LoraSection(rank=4, alpha=8.0, train_unembed=True)
LOSSES = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
BOUNDS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def make(
    path: Path,
    dtype: torch.dtype = torch.float32,
    budget: int = 64,
    custom_graph_gb: float | None = None,
    *,
    chunk: int = 1000,
    gradient_checkpointing: bool = False,
    **kwargs: Any,
) -> Learner:
    section = LearnerSection(
        token_budget=budget,
        logprob_chunk_tokens=chunk,
        custom_graph_gb=custom_graph_gb,
        gradient_checkpointing=gradient_checkpointing,
    )
    return Learner(path, ModelSection(path=str(path)), section, dtype=dtype, **kwargs)


class Lender:
    """Learners with adapters for one test after another: a base is loaded once for all tests that want it alike."""

    def __init__(self) -> None:
        self._idle: dict[tuple[Any, ...], list[Learner]] = {}
        self._lent: list[tuple[tuple[Any, ...], Learner, LearnerSection]] = []

    def lend(self, path: Path, *args: Any, **kwargs: Any) -> Learner:
        """As `make`, until the end of the test; two calls in one test give two learners."""
        key = (path, args, tuple(sorted(kwargs.items())))
        return self._one(key, lambda: make(path, *args, **kwargs))

    def lend_for(self, path: Path, model: ModelSection, section: LearnerSection) -> Learner:
        """The learner of a job with these sections."""
        return self._one(
            (path, model.model_dump_json(), section.model_dump_json()), lambda: Learner(path, model, section)
        )

    def _one(self, key: tuple[Any, ...], new: Callable[[], Learner]) -> Learner:
        idle = self._idle.setdefault(key, [])
        learner = idle.pop() if idle else new()
        self._lent.append((key, learner, learner._forward.section))
        return learner

    def take_back(self) -> None:
        for key, learner, section in self._lent:
            for run in learner.runs.ids:
                learner.runs.drop(run)
            learner._forward.section, learner._forward.budget = section, TokenBudget(section.token_budget, ALONE)
            self._idle[key].append(learner)
        self._lent.clear()


LENDER = Lender()
lend, lend_for = LENDER.lend, LENDER.lend_for


def draw(datums: int = 8, seed: int = 0) -> DatumBatch:
    """Datums of 2 to 20 positions; the first of each are masked, as a prompt is."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 21, datums)
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weights = np.ones(total, np.float32)
    weights[offsets[:-1]] = 0.0
    return DatumBatch(
        random.integers(0, 64, total).astype(np.int32),
        random.integers(0, 64, total).astype(np.int32),
        offsets,
        {
            "weights": weights,
            "logprobs": random.uniform(-6, -1, total).astype(np.float32),
            "advantages": random.normal(size=total).astype(np.float32),
        },
    )


def datums_of(batch: DatumBatch) -> list[Datum]:
    """The datums of which `batch` is made."""
    spans = [slice(a, b) for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    return [
        Datum(
            ModelInput.from_ints(batch.tokens[span]),
            {"target_tokens": batch.targets[span], **{key: column[span] for key, column in batch.columns.items()}},
        )
        for span in spans
    ]


def preference(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Bradley-Terry over neighbours, and a term that is not linear in any log-probability."""
    scores, spread = [], torch.zeros((), dtype=logprobs[0].dtype)
    for datum, logp in zip(data, logprobs, strict=True):
        weight = torch.as_tensor(np.asarray(datum.loss_fn_inputs["weights"]), dtype=logp.dtype)
        scores.append((weight * logp).sum())
        spread = spread + (weight * logp**2).sum()
    margins = torch.stack(scores[::2]) - torch.stack(scores[1::2])
    return -torch.nn.functional.logsigmoid(0.1 * margins).sum() + 1e-2 * spread, {}


def with_run(learner: Learner, lora: LoraSection = ALL_TARGETS, run: str = "run", seed: int = 1) -> Learner:
    """A run whose B is not zero, so that A's gradient is not either."""
    learner.runs.create(run, lora, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in learner.runs[run].parameters.items():
        if name.endswith(".lora_B"):
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    return learner


def gradients(learner: Learner, run: str = "run") -> dict[str, Tensor]:
    found = {}
    for name, weight in learner.runs[run].parameters.items():
        assert weight.grad is not None
        found[name] = weight.grad.clone()
    return found


def weights(learner: Learner, run: str = "run") -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in learner.runs[run].parameters.items()}


def state(learner: Learner, run: str) -> list[Tensor]:
    """All that a run owns: weights, accumulated gradients, optimizer state."""
    owned = list(weights(learner, run).values())
    owned += [weight.grad.clone() for weight in learner.runs[run].parameters.values() if weight.grad is not None]
    for part in learner.runs[run].stepper.parts:
        owned += [value.clone() for entry in part.state.values() for value in entry.values()]
    return owned


@dataclass(frozen=True, slots=True)
class RunBytes:
    """Memory of one run; 0 for what it does not hold. `gradient` doubles during a forward_backward that adds to it."""

    weights: int
    gradient: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradient + self.optimizer


def run_bytes(learner: Learner, run_id: str) -> RunBytes:
    """What the run holds in memory now, without the base."""
    run = learner.runs[run_id]
    grads = [weight.grad for weight in run.parameters.values() if weight.grad is not None]
    return RunBytes(_bytes(run.parameters.values()), _bytes(grads), _bytes(run.stepper.state().values()))


def base_bytes(learner: Learner) -> int:
    """Of the base's weights that are in this process."""
    base = [weight for name, weight in learner._model.named_parameters() if ".lora_" not in name]
    return _bytes(weight.to_local() if isinstance(weight, DTensor) else weight for weight in base)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def assert_same_bits(found: list[Tensor] | Mapping[str, Tensor], wanted: list[Tensor] | Mapping[str, Tensor]) -> None:
    if isinstance(found, Mapping) or isinstance(wanted, Mapping):
        assert isinstance(found, Mapping) and isinstance(wanted, Mapping) and found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], bound: float) -> None:
    """||g - g'|| <= bound ||g|| for each parameter, no absolute tolerance."""
    assert found.keys() == wanted.keys()
    assert any(gradient.norm() > 0 for gradient in wanted.values())
    for name in wanted:
        error, size = float((found[name] - wanted[name]).norm()), float(wanted[name].norm())
        assert error <= bound * size, f"{name}: {error:.2e} of {size:.2e}"


def plain(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Plain transformers; its norms compute in fp32 even in a float64 model, so torch's stand in."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Qwen3RMSNorm":
            norm = torch.nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def alone(model: Any, batch: DatumBatch) -> Tensor:
    """(T,) log-probabilities, sequence by sequence, unpacked and unpadded."""
    found = []
    for d in range(batch.num_datums):
        part = slice(batch.offsets[d], batch.offsets[d + 1])
        logits = model(torch.from_numpy(batch.tokens[part].astype(np.int64))[None]).logits[0]
        targets = torch.from_numpy(batch.targets[part].astype(np.int64))
        found.append(torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0])
    return torch.cat(found)


def reference(path: Path, batch: DatumBatch, dtype: torch.dtype = torch.float64) -> np.ndarray:
    found: np.ndarray = alone(plain(path, dtype), batch).detach().numpy()
    return found
