"""The learner: one base model and the runs that are trained on it.

    forward_backward   adds the gradient of a loss to the run's parameters, until ``optim_step`` applies and clears it
    ..._custom         the same for a user's own loss
    logprobs           of given sequences, under a run's adapter or under the base with every adapter off

``trainable="lora"``: a frozen base with one adapter per run. ``trainable="all"``: no adapter; the only run, "base",
trains all weights. Both share datums, packing, losses and accumulation.

Each of several ranks gets the same batch in the same call and computes its share; all ranks return the complete result.
Gradients stay separate until ``optim_step``, which sums them once and does the same arithmetic on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from rlsys.architectures.precision import computing_dtype
from rlsys.datums import DatumBatch
from rlsys.distributed.ranks import ALONE, Ranks
from rlsys.errors import ConfigError, GradientError
from rlsys.learner.accumulation import GradientAccumulation, Where
from rlsys.learner.base_fingerprint import BaseFingerprint, fingerprint_of
from rlsys.learner.custom_loss import CustomLoss
from rlsys.learner.forward import ForwardPass, Progress, unpacked
from rlsys.learner.load_model import decoder_layers, load_model, save_model
from rlsys.learner.optimizer import Kind, Stepper, clip, global_norm
from rlsys.learner.runs import BASE_RUN, Run, RunRegistry
from rlsys.learner.token_budget import TokenBudget
from rlsys.learner.turns import Turns, finish, preceded
from rlsys.losses import Loss
from rlsys.modeling.activation_checkpointing import keep_inputs_only
from rlsys.modeling.load_checks import logit_transform
from rlsys.modeling.lora import Adapters
from rlsys.modeling.vllm_parity import match_sampler
from rlsys.types import AdamParams, Array, BatchResult, Datum
from rlsys.weight_sync.update import AdapterSnapshot

if TYPE_CHECKING:  # a learner only reads them: GPU checks run without pydantic
    from rlsys.config import LearnerSection, ModelSection


class Learner:
    """Loads a base and trains runs on it. Not thread-safe.

    `dtype` overrides ``model.dtype`` and the computing dtype (rlsys/architectures/precision.py): tests of the
    mathematics use float64. Trained weights, accumulated gradients and optimizer state are fp32 (then float64) for a
    base in any dtype. `base_name` is the base's name in saved adapters, by default ``model.path``. With several
    `ranks`, all of them make the same calls in the same order, except for calls that only read (snapshot,
    runs.save_adapter, runs.state, ...).
    """

    def __init__(
        self,
        base: Path | str,
        model: ModelSection,
        section: LearnerSection,
        trainable: Literal["lora", "all"] = "lora",
        optimizer: Kind = "adamw",
        dtype: torch.dtype | None = None,
        base_name: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        torch.set_num_threads(section.threads or 1)
        shard = section.shard_base and trainable == "lora"  # all weights are trained by one learner, without ranks
        self._ranks = ranks
        self._progress = Progress()
        self._base_name = base_name or model.path or str(base)
        self._saved_dtype: torch.dtype = dtype or getattr(torch, model.dtype)
        trained_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        loaded_dtype = self._saved_dtype if trainable == "lora" else trained_dtype
        computing: torch.dtype = dtype or getattr(torch, computing_dtype(model.dtype, section.device))
        self._model = load_model(
            base, loaded_dtype, computing if trainable == "lora" else loaded_dtype, "cpu" if shard else section.device
        )
        match_sampler(self._model, model.max_length)
        positions: int = self._model.config.get_text_config().max_position_embeddings
        self._max_length = min(model.max_length, positions)
        self._identity = fingerprint_of(self._model)
        adapters, budget = Adapters(self._model), TokenBudget(section.token_budget, ranks)
        self._forward = ForwardPass(
            self._model, adapters, logit_transform(self._model), section, budget, ranks, self._progress
        )
        if section.gradient_checkpointing:
            keep_inputs_only(decoder_layers(self._model, "learner.gradient_checkpointing"))
        if shard:
            self._forward.shard(decoder_layers(self._model, "learner.shard_base"))
        self._accumulation = GradientAccumulation(self._forward, ranks, trained_dtype, self._progress)
        if trainable == "lora" and optimizer != "adamw":
            raise ConfigError(f"optimizer: found {optimizer!r} for adapters; wanted 'adamw' (muon is for all weights)")
        base_run = self._base_run(optimizer) if trainable == "all" else None
        self.runs = RunRegistry(adapters, trained_dtype, self._base_name, base_run)

    def _base_run(self, optimizer: Kind) -> Run:
        self._model.requires_grad_(True)
        parameters = dict(self._model.named_parameters())
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        stepper = Stepper(parameters, optimizer, adamw_only=frozenset(id(end.weight) for end in ends))
        return Run(BASE_RUN, None, None, parameters, stepper)

    @property
    def vocab_size(self) -> int:
        size: int = self._model.config.get_text_config().vocab_size
        return size

    @property
    def max_length(self) -> int:
        """Tokens of one sequence, prompt and completion together."""
        return self._max_length

    @property
    def base_name(self) -> str:
        return self._base_name

    @property
    def identity(self) -> BaseFingerprint:
        """Fingerprint of the base as loaded."""
        return self._identity

    @property
    def computing_dtype(self) -> str:
        """The dtype in which the base's layers compute: model.dtype, unless this CPU has no kernels for it."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def token_budget(self) -> TokenBudget:
        return self._forward.budget

    def progress(self) -> int:
        """A number that grows with every pass and step. Safe to read from another thread."""
        return self._progress.count

    def forward(
        self, run_id: str | None, batch: DatumBatch, loss: Loss, temperature: float = 1.0, *, where: Where = "all"
    ) -> BatchResult:
        """The loss without gradients; None is the base with every adapter off. `where` as in forward_backward."""
        return finish(self.forward_in_turns(run_id, batch, loss, temperature, where=where))

    def forward_in_turns(
        self, run_id: str | None, batch: DatumBatch, loss: Loss, temperature: float = 1.0, *, where: Where = "all"
    ) -> Turns[BatchResult]:
        """As `forward`, with a pause after every micro-batch, in which other runs may be used."""
        return self._in_turns(run_id, self._accumulation.loss(batch, loss, temperature, where))

    def forward_backward(
        self, run_id: str, batch: DatumBatch, loss: Loss, temperature: float = 1.0, *, where: Where = "all"
    ) -> BatchResult:
        """Add the gradient of the summed loss to the gradient accumulated since the last step.

        ``where="weighted"``: log-probabilities are computed only where the weight is not 0, and are 0.0 elsewhere. The
        loss, its gradient and the metrics are the same, and prompts cost no output layer.

        If anything fails, the accumulated gradient is unchanged.
        """
        return finish(self.forward_backward_in_turns(run_id, batch, loss, temperature, where=where))

    def forward_backward_in_turns(
        self, run_id: str, batch: DatumBatch, loss: Loss, temperature: float = 1.0, *, where: Where = "all"
    ) -> Turns[BatchResult]:
        """As `forward_backward`, with a pause after every micro-batch, in which other runs may be used. Results do not
        depend on it. A pass that is closed leaves the accumulated gradient unchanged."""
        return self._in_turns(run_id, self._accumulation.add(self.runs[run_id], batch, loss, temperature, where))

    def forward_backward_custom(
        self, run_id: str, batch: DatumBatch, data: Sequence[Datum], fn: CustomLoss, temperature: float = 1.0
    ) -> BatchResult:
        """As forward_backward for a user's own loss ``fn(data, logprobs)``; `data` are the datums of `batch`.

        One pass while the graphs of all micro-batches fit in ``learner.custom_graph_gb``; micro-batches whose graphs do
        not fit run forward twice. ``metrics`` say which. Every rank calls `fn` on all datums.

        Raises:
            LossError: `fn` raised, or did not return a loss and metrics.
        """
        return finish(self.forward_backward_custom_in_turns(run_id, batch, data, fn, temperature))

    def forward_backward_custom_in_turns(
        self, run_id: str, batch: DatumBatch, data: Sequence[Datum], fn: CustomLoss, temperature: float = 1.0
    ) -> Turns[BatchResult]:
        """As `forward_backward_custom`, with the pauses of `forward_backward_in_turns`."""
        assert len(data) == batch.num_datums > 0
        return self._in_turns(run_id, self._accumulation.add_custom(self.runs[run_id], batch, data, fn, temperature))

    def optim_step(self, run_id: str, adam: AdamParams) -> dict[str, float]:
        """Apply the accumulated gradient and clear it. ``grad_norm`` is the global L2 norm before clipping.

        Raises:
            GradientError: there is no gradient, or its norm is not finite. Weights and optimizer state are untouched.
        """
        run = self.runs[run_id]
        if not run.has_gradient:
            raise GradientError(
                f"run {run_id!r}, step {run.version}: no forward_backward since the last optim_step; nothing to apply"
            )
        parameters = list(run.parameters.values())
        self._ranks.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = global_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        grad_norm = float(norm)
        if math.isfinite(grad_norm):
            if adam.grad_clip_norm > 0:
                clip(parameters, adam.grad_clip_norm, norm)
            run.stepper.step(adam)
            run.version += 1
            self._progress.advance()
        run.forget_gradient()
        if not math.isfinite(grad_norm):
            raise GradientError(
                f"run {run_id!r}, step {run.version}: the gradient norm is {grad_norm}; wanted a finite one. Weights "
                "and optimizer state are unchanged, the gradient is cleared. Likely causes: a learning rate that let "
                "the weights explode in earlier steps; log-probabilities in the datums that are not the sampler's, so "
                "that exp(p - q) overflows; very large advantages or weights"
            )
        return {"grad_norm": grad_norm}

    def logprobs(
        self,
        run_id: str | None,
        tokens: Array,
        offsets: Array,
        temperature: float = 1.0,
        *,
        only: Array | None = None,
    ) -> Array:
        """(T,) float32 nats of each token given those before it; 0.0 for the first of each sequence.

        `tokens` holds the sequences end to end, `offsets` is (S + 1,); None is the base with every adapter off. `only`:
        token numbers; all other tokens get 0.0.
        """
        self.runs.activate(run_id)
        return self._forward.sequence_logprobs(tokens, offsets, temperature, only)

    def eager_logprobs(self, run_id: str | None, tokens: Array) -> Array:
        """(T,) float32 as `logprobs` of one sequence, computed by transformers' eager attention: the difference between
        two kernels of one model is the noise of its precision."""
        with unpacked(self._model, "eager"):
            return self.logprobs(run_id, tokens, np.array([0, len(tokens)]))

    def greedy(
        self, prompts: Sequence[Array], max_tokens: int, eos_ids: Sequence[int], run_id: str | None = None
    ) -> list[Array]:
        """Greedy decoding: int32 completions, including the ending token."""
        self.runs.activate(run_id)
        return self._forward.greedy(prompts, max_tokens, eos_ids)

    def snapshot(self, run_id: str, dtype: str) -> AdapterSnapshot:
        """The adapter as samplers serve it: alpha / r folded into B before the cast to `dtype`."""
        return self.runs.snapshot(run_id, dtype)

    def probe(
        self, run_id: str, dtype: str, tokens: Array, size: float = 1.0, seed: int = 0
    ) -> tuple[AdapterSnapshot, Array, Array]:
        """An adapter shaped like the run's, with deltas `size` times as large as the weights that they change, and
        (C,) float32 log-probabilities of one sequence under it, by packed and by eager attention."""
        probe_id = f"{run_id}.probe"
        self.runs.create(probe_id, self.runs.lora(run_id), seed)
        try:
            with self._ranks.guard("reading the base's weights"):
                self.runs.enlarge(probe_id, size, seed)
            packed = self.logprobs(probe_id, tokens, np.array([0, len(tokens)]))
            return self.snapshot(probe_id, dtype), packed, self.eager_logprobs(probe_id, tokens)
        finally:
            self.runs.drop(probe_id)

    def _in_turns(self, run_id: str | None, turns: Turns[BatchResult]) -> Turns[BatchResult]:
        """Activate the run before each turn: other runs may have been used in between."""
        return preceded(lambda: self.runs.activate(run_id), turns)

    def save_model(self, out: Path) -> None:
        """Write all weights as a Hugging Face folder in ``model.dtype``; the caller adds the tokenizer."""
        if not self.runs.trains_base:
            raise ConfigError("save_model: this learner trains adapters, its base is unchanged; use runs.save_adapter")
        save_model(self._model, self._saved_dtype, out)
