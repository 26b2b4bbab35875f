"""The learner: one base model and the runs that are trained on it.

    forward_backward   gradients of the loss add up in the run's parameters until ``optim_step`` applies and clears them
    ..._custom         the same for a loss of the user's own
    logprobs           of given sequences, under a run's adapter or under the base with every adapter off

``trainable="lora"``: a frozen base with one adapter per run. ``trainable="all"``: no adapter; the one run is called
"base" and owns all weights. Both share datums, packing, losses and accumulation.

Of several ranks each is given the same whole batch at the same call and works on its share of it. All have the whole
result then; gradients stay apart until ``optim_step``, which sums them once and is the same arithmetic on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from rlsys import losses
from rlsys.architectures.precision import computing_dtype
from rlsys.datums import DatumBatch
from rlsys.distributed.ranks import ALONE, Ranks, local
from rlsys.errors import ConfigError, GradientError
from rlsys.learner import loss_scale
from rlsys.learner.base_fingerprint import BaseFingerprint, fingerprint_of
from rlsys.learner.custom_loss import CustomLoss, compute_custom_loss, result_metrics
from rlsys.learner.graph_cache import GraphCache
from rlsys.learner.optimizer import Kind, Stepper, clip, global_norm, require_like
from rlsys.learner.packing import MicroBatch, bins, filler, micro_batch, prefix_groups
from rlsys.learner.token_budget import TokenBudget
from rlsys.losses import Loss
from rlsys.modeling import attention
from rlsys.modeling.activation_checkpointing import keep_inputs_only
from rlsys.modeling.load_checks import check_packing, logit_transform
from rlsys.modeling.logprobs import logprobs_and_entropy, token_logprobs
from rlsys.modeling.lora import Adapters
from rlsys.modeling.rms_norm import replace_norms
from rlsys.modeling.text_part import load_language_model
from rlsys.modeling.vllm_parity import as_published, match_sampler
from rlsys.types import AdamParams, Array, Datum
from rlsys.utils.free_memory import free_bytes
from rlsys.utils.gpu_memory import unused_bytes
from rlsys.weight_sync.update import AdapterSnapshot, snapshot_of

if TYPE_CHECKING:  # a learner only reads them: what checks a GPU has no pydantic
    from rlsys.config import LearnerSection, LoraSection, ModelSection

BASE_RUN = "base"  # the run id of trainable="all"


@dataclass(frozen=True, slots=True)
class BatchResult:
    """``loss_sum`` equals ``metrics["loss:sum"]``, summed in float64."""

    loss_sum: float
    metrics: Mapping[str, float]
    logprobs: Array  # (T,) float32 nats of the targets, in the batch's order


@dataclass(frozen=True, slots=True)
class RunBytes:
    """Memory of one run, 0 for what it has not needed yet; `gradient` doubles while a forward_backward adds to it."""

    weights: int
    gradient: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradient + self.optimizer


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run has learned up to its last step, by tensor name; without `optimizer` its moments start anew."""

    version: int
    weights: Mapping[str, Tensor]  # <module path>.lora_A and .lora_B
    optimizer: Mapping[str, Tensor] | None  # as ``Stepper.state``


@dataclass(slots=True)
class _Run:
    """What one run owns: nothing of it is touched by a step of another."""

    id: str
    adapter: str | None  # its name inside Adapters; None for all weights
    section: LoraSection | None
    parameters: dict[str, nn.Parameter]
    stepper: Stepper
    version: int = 0
    has_gradient: bool = False

    def take_gradients(self) -> list[Tensor | None]:
        taken = [parameter.grad for parameter in self.parameters.values()]
        self.set_gradients([None] * len(taken))
        return taken

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient

    def add_gradients(self, earlier: Sequence[Tensor | None]) -> None:
        """What no datum reached gets zeros: every rank then has a gradient of everything."""
        for parameter, gradient in zip(self.parameters.values(), earlier, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            elif gradient is not None:
                parameter.grad.add_(gradient)


class Learner:
    """Loads a base and trains runs on it. One thread at a time.

    `dtype` overrides ``model.dtype`` and what is computed in (rlsys/architectures/precision.py): float64 serves tests
    of the mathematics. Trained weights, accumulated gradients and optimizer state are fp32 (float64 then) whatever the
    base is in. `base_name` is what saved adapters call the base, by default ``model.path``. With several `ranks`, all
    of them make the same calls in the same order, but for those that only look (snapshot, save_adapter, run_state,
    ...).
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
        torch.set_num_threads(section.threads)
        shard = section.shard_base and trainable == "lora"  # all weights are made by one learner, before any ranks
        self._ranks = ranks
        self._moved = 0
        self._base_name = base_name or model.path or str(base)
        self._section = section
        self._budget = TokenBudget(section.token_budget, ranks)
        self._keeps_graphs = section.custom_graph_gb != 0
        self._saved_dtype: torch.dtype = dtype or getattr(torch, model.dtype)
        self._trained_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        loaded_dtype = self._saved_dtype if trainable == "lora" else self._trained_dtype
        computing: torch.dtype = dtype or getattr(torch, computing_dtype(model.dtype, section.device))
        self._model = _load(
            base, loaded_dtype, computing if trainable == "lora" else loaded_dtype, "cpu" if shard else section.device
        )
        match_sampler(self._model, model.max_length)
        positions: int = self._model.config.get_text_config().max_position_embeddings
        self._scales = self._model.dtype == torch.float16
        self._max_length = min(model.max_length, positions)
        self._identity = fingerprint_of(self._model)
        self._transform = logit_transform(self._model)
        self._forward: Callable[[MicroBatch, float], tuple[Tensor, Tensor]] = self._bare_logprobs
        if section.gradient_checkpointing:
            keep_inputs_only(_layers(self._model, "learner.gradient_checkpointing"))
        if shard:
            layers = _layers(self._model, "learner.shard_base")
            self._forward = ranks.shard(self._model, layers, self._bare_logprobs)
        self._base = list(self._model.parameters())
        self._adapters = Adapters(self._model)
        self._runs: dict[str, _Run] = {}
        self._trainable = trainable
        if trainable == "lora" and optimizer != "adamw":
            raise ConfigError(f"optimizer: found {optimizer!r} for adapters; wanted 'adamw' (muon is for all weights)")
        if trainable == "all":
            self._model.requires_grad_(True)
            parameters = dict(self._model.named_parameters())
            ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
            stepper = Stepper(parameters, optimizer, adamw_only=frozenset(id(end.weight) for end in ends))
            self._runs[BASE_RUN] = _Run(BASE_RUN, None, None, parameters, stepper)

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
        """Of the base as it was loaded."""
        return self._identity

    @property
    def computing_dtype(self) -> str:
        """In which the base's layers compute: model.dtype, unless this CPU has no kernels for it."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def base_bytes(self) -> int:
        """Of the base's weights that are in this process."""
        return _bytes(map(local, self._base))

    @property
    def token_budget(self) -> TokenBudget:
        return self._budget

    def progress(self) -> int:
        """Micro-batches begun and finished, and steps; for another thread that wants to know whether anything moves."""
        return self._moved

    @property
    def run_ids(self) -> list[str]:
        return list(self._runs)

    def create_run(self, run_id: str, lora: LoraSection, seed: int) -> None:
        """A new adapter that begins as the base; the same seed and section make the same weights."""
        if self._trainable == "all":
            raise ConfigError(
                f"run {run_id!r}: this learner trains all weights as run {BASE_RUN!r} and has no adapters"
            )
        if run_id in self._runs:
            raise ConfigError(f"run {run_id!r} exists already; {self._known()}")
        adapter = self._adapters.add(lora, seed, self._trained_dtype)
        parameters = self._adapters.parameters(adapter)
        self._runs[run_id] = _Run(run_id, adapter, lora, parameters, Stepper(parameters, "adamw"))

    def drop_run(self, run_id: str) -> None:
        adapter, _ = self._adapter(run_id)
        self._adapters.drop(adapter)
        del self._runs[run_id]

    def copy_run(self, run_id: str, copy_id: str) -> None:
        """Make `copy_id` a run with the weights that the run has now, without its moments; a new one, or as it stands.
        What is only to be read costs its weights alone."""
        if copy_id not in self._runs:
            self.create_run(copy_id, self._adapter(run_id)[1], seed=0)  # its weights are replaced at once
        state = self.run_state(run_id)
        self.restore(copy_id, RunState(state.version, state.weights, None))

    def version(self, run_id: str) -> int:
        """Optimizer steps applied so far."""
        return self._run(run_id).version

    def forward(
        self,
        run_id: str | None,
        batch: DatumBatch,
        loss: Loss,
        temperature: float = 1.0,
        *,
        where: Literal["all", "weighted"] = "all",
    ) -> BatchResult:
        """The loss without gradients; None is the base with every adapter off. `where` as in forward_backward."""
        self._select(run_id)

        def work() -> BatchResult:
            with torch.no_grad():
                return self._pass(batch, loss, temperature, where)

        return self._budget.fitting(work)

    def forward_backward(
        self,
        run_id: str,
        batch: DatumBatch,
        loss: Loss,
        temperature: float = 1.0,
        *,
        where: Literal["all", "weighted"] = "all",
    ) -> BatchResult:
        """Add the gradient of the summed loss to what has accumulated since the last step.

        ``where="weighted"``: log-probabilities are computed only where the weight is not 0, and are 0.0 elsewhere; the
        loss, its gradient and the metrics are the same, and prompts cost no output layer.

        If anything fails on the way, the accumulated gradient is as it was before the call.
        """

        def work() -> BatchResult:
            with self._accumulating(run_id) as run:
                return self._pass(batch, loss, temperature, where, run)

        return self._budget.fitting(work)

    def forward_backward_custom(
        self, run_id: str, batch: DatumBatch, data: Sequence[Datum], fn: CustomLoss, temperature: float = 1.0
    ) -> BatchResult:
        """As forward_backward for the user's own loss ``fn(data, logprobs)``, whose datums are those of `batch`.

        One pass while the graphs of all micro-batches fit in ``learner.custom_graph_gb``, else those that do not fit
        run forward twice; ``metrics`` say which. Every rank calls `fn` on the whole batch.

        Raises:
            LossError: `fn` raised or returned something else than a loss and metrics.
        """
        assert len(data) == batch.num_datums > 0
        return self._budget.fitting(
            lambda: self._custom_pass(run_id, batch, data, fn, temperature), instead=self._give_up_graphs
        )

    def optim_step(self, run_id: str, adam: AdamParams) -> dict[str, float]:
        """Apply the accumulated gradient and clear it. ``grad_norm`` is the global L2 norm before clipping.

        Raises:
            GradientError: there is no gradient, or its norm is not finite. Weights and optimizer state are untouched.
        """
        run = self._run(run_id)
        if not run.has_gradient:
            raise GradientError(
                f"run {run_id!r}, step {run.version}: no forward_backward since the last optim_step; nothing to apply"
            )
        parameters = list(run.parameters.values())
        self._ranks.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = global_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        found = float(norm)
        if math.isfinite(found):
            if adam.grad_clip_norm > 0:
                clip(parameters, adam.grad_clip_norm, norm)
            run.stepper.step(adam)
            run.version += 1
            self._moved += 1
        run.take_gradients()
        run.has_gradient = False
        if not math.isfinite(found):
            raise GradientError(
                f"run {run_id!r}, step {run.version}: the gradient norm is {found}; wanted a finite one. Weights and "
                "optimizer state are as before, the gradient is cleared. Likely causes: a learning rate that let the "
                "weights explode in earlier steps; log-probabilities in the datums that are not the sampler's, so that "
                "exp(p - q) overflows; advantages or weights of enormous size"
            )
        return {"grad_norm": found}

    def logprobs(
        self,
        run_id: str | None,
        tokens: Array,
        offsets: Array,
        temperature: float = 1.0,
        *,
        only: Array | None = None,
    ) -> Array:
        """(T,) float32 nats of each token given those before it; 0.0 for a sequence's first, which nothing predicts.

        `tokens` holds the sequences end to end, `offsets` is (S + 1,); None is the base with every adapter off. `only`:
        token numbers, for all others 0.0 is given.
        """
        self._select(run_id)
        offsets = np.asarray(offsets, np.int64)
        predicted = np.zeros(len(tokens), bool)  # those that something predicts and somebody asks for
        predicted[slice(None) if only is None else only] = True
        predicted[offsets[:-1][np.diff(offsets) > 0]] = False
        batch = DatumBatch(np.asarray(tokens), np.roll(tokens, -1), offsets, {})

        def work() -> Array:
            found = np.zeros(len(tokens), np.float32)
            with self._ranks.joint(found), torch.no_grad():
                for micro in self._micro_batches(batch, np.roll(predicted, -1)):
                    _put(found, micro, self._logprobs(micro, temperature).float())
            return np.roll(found, 1)  # position t - 1 predicts token t

        return self._budget.fitting(work)

    def eager_logprobs(self, run_id: str | None, tokens: Array) -> Array:
        """(T,) float32 as `logprobs` of one sequence, computed by transformers' eager attention: the difference between
        two kernels of one model is the noise of its precision."""
        with _unpacked(self._model, "eager"):
            return self.logprobs(run_id, tokens, np.array([0, len(tokens)]))

    def greedy(
        self, prompts: Sequence[Array], max_tokens: int, eos_ids: Sequence[int], run_id: str | None = None
    ) -> list[Array]:
        """The likeliest next token, again and again: int32 completions, an ending token included."""
        self._select(run_id)
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(eos_ids), pad_token_id=0, use_cache=True
        )
        device = self._model.device
        with torch.no_grad(), _unpacked(self._model), self._ranks.guard("greedy decoding"):
            out = self._model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        return [_until(row, eos_ids) for row in out[:, width:].cpu().numpy()]

    def snapshot(self, run_id: str, dtype: str) -> AdapterSnapshot:
        """The adapter as samplers serve it: alpha / r folded into B before the cast to `dtype`."""
        adapter, lora = self._adapter(run_id)
        return snapshot_of(run_id, self.version(run_id), lora.rank, self._adapters.scaled(adapter), dtype)

    def probe(
        self, run_id: str, dtype: str, tokens: Array, size: float = 1.0, seed: int = 0
    ) -> tuple[AdapterSnapshot, Array, Array]:
        """An adapter shaped like the run's whose deltas are `size` times as large as the weights that they change, and
        (C,) float32 log-probabilities of one sequence under it, by packed and by eager attention."""
        probe_id = f"{run_id}.probe"
        self.create_run(probe_id, self._adapter(run_id)[1], seed)
        try:
            with self._ranks.guard("reading the base's weights"):
                self._adapters.enlarge(self._adapter(probe_id)[0], size, seed)
            packed = self.logprobs(probe_id, tokens, np.array([0, len(tokens)]))
            return self.snapshot(probe_id, dtype), packed, self.eager_logprobs(probe_id, tokens)
        finally:
            self.drop_run(probe_id)

    def save_adapter(self, run_id: str, out: Path) -> None:
        """adapter_config.json and adapter_model.safetensors, as PEFT loads them."""
        self._adapters.save(self._adapter(run_id)[0], Path(out), self._base_name)

    def lora(self, run_id: str) -> LoraSection:
        return self._adapter(run_id)[1]

    def has_gradient(self, run_id: str) -> bool:
        """Whether anything has accumulated since the last step."""
        return self._run(run_id).has_gradient

    def forget_gradient(self, run_id: str) -> None:
        """What has accumulated since the last step counts no more."""
        run = self._run(run_id)
        run.take_gradients()
        run.has_gradient = False

    def run_state(self, run_id: str) -> RunState:
        """Views onto what the run has learned, gradients accumulated since its last step not included."""
        run = self._run(run_id)
        weights = {name: weight.detach() for name, weight in run.parameters.items()}
        return RunState(run.version, weights, run.stepper.state())

    def restore(self, run_id: str, state: RunState) -> None:
        """Put a run of the same shape into this state; gradients that have accumulated were of other weights and go.

        Raises:
            CheckpointError: names, shapes or dtypes are not the run's; nothing has changed then.
        """
        run = self._run(run_id)
        require_like(f"run {run_id!r}", state.weights, run.parameters)
        run.stepper.restore(state.optimizer or {})
        with torch.no_grad():
            for name, weight in run.parameters.items():
                weight.copy_(state.weights[name])
        run.take_gradients()
        run.has_gradient, run.version = False, state.version

    def run_bytes(self, run_id: str) -> RunBytes:
        """What the run holds in memory at this moment, beside the base that all share."""
        run = self._run(run_id)
        gradients = [weight.grad for weight in run.parameters.values() if weight.grad is not None]
        return RunBytes(_bytes(run.parameters.values()), _bytes(gradients), _bytes(run.stepper.state().values()))

    def save_model(self, out: Path) -> None:
        """All weights as a Hugging Face folder in ``model.dtype``; the tokenizer is the caller's."""
        if self._trainable != "all":
            raise ConfigError("save_model: this learner trains adapters, its base is unchanged; use save_adapter")
        kept = [(weight, weight.data) for weight in self._model.parameters()]
        try:
            for weight, values in kept:
                weight.data = values.to(self._saved_dtype)
            with as_published(self._model):
                self._model.save_pretrained(out)
        finally:
            for weight, values in kept:
                weight.data = values

    def _custom_pass(
        self, run_id: str, batch: DatumBatch, data: Sequence[Datum], fn: CustomLoss, temperature: float
    ) -> BatchResult:
        with self._accumulating(run_id) as run:
            micros = self._micro_batches(batch)
            p_T = np.zeros(len(batch.tokens), np.float64 if self._trained_dtype == torch.float64 else np.float32)
            again = np.zeros(1, p_T.dtype)  # micro-batches, of all ranks
            kept: list[Tensor] = []
            graphs = GraphCache(self._graph_bytes() if len(micros) > 1 else 0, self._model.parameters())
            with self._ranks.joint(p_T, again):
                for micro in micros:
                    if len(kept) < len(micros) - 1:
                        logp = graphs.forward(partial(self._logprobs, micro, temperature), micro.tokens.shape[1])
                    else:  # the last one's graph takes the memory that its backward pass takes anyway
                        logp = self._logprobs(micro, temperature)
                    _put(p_T, micro, logp)
                    again += not logp.requires_grad
                    kept.append(logp)
            found = compute_custom_loss(fn, data, torch.from_numpy(p_T).split(batch.lengths.tolist()))
            slope_T = torch.cat(found.slopes)
            overflows = np.zeros(1)
            with self._ranks.joint(overflows):
                for micro in reversed(micros):
                    logp = kept.pop()
                    if not logp.requires_grad:
                        logp = self._logprobs(micro, temperature)
                    slope = slope_T[torch.from_numpy(micro.index)] if len(micro.index) else torch.zeros(1)
                    if self._scales:
                        overflows += self._backward_scaled(run, micro, temperature, logp, slope.to(logp))
                    else:
                        self._backward(logp, slope.to(logp))
        metrics = result_metrics(found.loss, found.metrics, 2 if again[0] else 1)
        if self._scales:
            metrics["overflows:sum"] = float(overflows[0])
        return BatchResult(found.loss, metrics, p_T.astype(np.float32))

    def _pass(
        self,
        batch: DatumBatch,
        loss: Loss,
        temperature: float,
        where: Literal["all", "weighted"],
        run: _Run | None = None,
    ) -> BatchResult:
        """The loss; with a run, its gradient too."""
        wanted_T = batch.columns["weights"] != 0 if where == "weighted" else None
        logp_T = np.zeros(len(batch.tokens), np.float64)
        values_T = np.zeros(len(batch.tokens), np.float64)
        entropy_T = np.zeros(len(batch.tokens) if self._section.entropy else 0, np.float64)
        overflows = np.zeros(1)
        with self._ranks.joint(logp_T, values_T, entropy_T, overflows):
            for micro in self._micro_batches(batch, wanted_T):
                logp, entropy = self._logprobs_and_entropy(micro, temperature)
                if len(micro.index) == 0:
                    values = 0.0 * logp
                else:
                    columns = {
                        key: torch.from_numpy(column[micro.index]).to(self._model.device)
                        for key, column in batch.columns.items()
                    }
                    values = loss(logp, columns)
                if run is not None and self._scales:
                    (slope,) = torch.autograd.grad(values.sum(), logp)
                    overflows += self._backward_scaled(run, micro, temperature, logp, slope)
                elif run is not None:
                    self._backward(values.sum())
                _put(logp_T, micro, logp.double())
                _put(values_T, micro, values.double())
                if self._section.entropy:
                    _put(entropy_T, micro, entropy.double())
        metrics = {"loss:sum": float(values_T.sum()), **losses.metrics(loss, logp_T, batch.columns)}
        if self._section.entropy:
            counts_T = batch.columns["weights"] != 0
            metrics["entropy:mean"] = float(entropy_T[counts_T].sum() / max(1, np.count_nonzero(counts_T)))
        if run is not None and self._scales:
            metrics["overflows:sum"] = float(overflows[0])
        return BatchResult(metrics["loss:sum"], metrics, logp_T.astype(np.float32))

    @contextmanager
    def _accumulating(self, run_id: str) -> Iterator[_Run]:
        """What the block adds to the run's gradient counts whole or not at all."""
        run = self._run(run_id)
        self._select(run_id)
        earlier = run.take_gradients()
        try:
            yield run
        except BaseException:  # an interrupt too must not leave the gradient of half a batch
            run.set_gradients(earlier)
            raise
        run.add_gradients(earlier)
        run.has_gradient = True

    def _micro_batches(self, batch: DatumBatch, wanted_T: Array | None = None) -> list[MicroBatch]:
        """Those of this rank's share. Where forward passes communicate, fillers make them as many on every rank."""
        device, ranks = self._model.device, self._ranks
        limit = min(self._budget.tokens, -(-len(batch.tokens) // ranks.size))  # or one family would be one rank's work
        parts = prefix_groups(batch, wanted_T, limit, share=self._section.share_prompts)
        costs = np.array([part.cost for part in parts], np.int64)
        shares = [(share, bins(costs[share], self._budget.tokens)) for share in ranks.shares(costs)]
        share, packs = shares[ranks.rank]
        micros = [micro_batch(batch, [parts[share[i]] for i in pack], wanted_T, device) for pack in packs]
        if ranks.shards:
            most = max(len(packs) for _, packs in shares)
            micros += [filler(device)] * (most - len(micros))
        return micros

    def _graph_bytes(self) -> int:
        """That graphs kept by a custom loss may take now; 0 where a shared base allows one forward pass at a time."""
        wanted = self._section.custom_graph_gb
        if self._ranks.shards or not self._keeps_graphs:
            return 0
        if wanted is not None:
            return int(wanted * 2**30)
        if self._model.device.type == "cuda":
            return unused_bytes() // 2
        return free_bytes() // 2 // self._ranks.size

    def _give_up_graphs(self) -> bool:
        """After running out of memory: whether there was something to give up, the same on all ranks."""
        given_up, self._keeps_graphs = self._keeps_graphs and not self._ranks.shards, False
        return given_up

    def _backward(self, values: Tensor, slope: Tensor | None = None) -> None:
        with self._ranks.guard("the backward pass"):
            values.backward(slope)
        self._moved += 1

    def _backward_scaled(self, run: _Run, micro: MicroBatch, temperature: float, logp: Tensor, slope: Tensor) -> int:
        """The same in float16 (rlsys/learner/loss_scale.py); returns how often a gradient overflowed and was made
        again. What is not finite at the least scale either stays so, and no step will be taken on it."""
        scale, overflows, earlier = loss_scale.first_scale(slope), 0, run.take_gradients()
        least = scale * loss_scale.LEAST
        while True:
            self._backward(logp, slope * scale)
            finite = loss_scale.are_finite(weight.grad for weight in run.parameters.values() if weight.grad is not None)
            if self._ranks.shards:  # a forward pass is one of all ranks
                failed = torch.tensor([float(not finite)])
                self._ranks.sum_([failed])
                finite = not failed
            if finite or scale / loss_scale.LOWER < least:
                break
            run.take_gradients()
            scale, overflows = scale / loss_scale.LOWER, overflows + 1
            logp = self._logprobs(micro, temperature)
        for weight in run.parameters.values():
            if weight.grad is not None:
                weight.grad.div_(scale)
        run.add_gradients(earlier)
        return overflows

    def _logprobs(self, micro: MicroBatch, temperature: float) -> Tensor:
        """(T,) nats of the micro-batch's targets."""
        return self._logprobs_and_entropy(micro, temperature)[0]

    def _logprobs_and_entropy(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """The same, and (T,) nats of entropy where the section wants it, else (0,)."""
        self._moved += 1
        with self._ranks.guard("the forward pass"):
            found = self._forward(micro, temperature)
        self._moved += 1
        return found

    def _bare_logprobs(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        hidden = self._model.base_model(
            input_ids=micro.tokens,
            position_ids=micro.positions,
            use_cache=False,
            **{attention.SEGMENTS: micro.segments},
        ).last_hidden_state[0]
        if micro.rows is not None:
            hidden = hidden.index_select(0, micro.rows)
        chunk = self._section.logprob_chunk_tokens
        arguments = (self._adapters.head(), hidden, micro.targets, temperature, chunk, self._transform)
        if self._section.entropy:
            return logprobs_and_entropy(*arguments)
        return token_logprobs(*arguments), hidden.new_zeros(0)

    def _select(self, run_id: str | None) -> None:
        self._adapters.activate(None if run_id is None else self._run(run_id).adapter)

    def _run(self, run_id: str) -> _Run:
        if run_id not in self._runs:
            raise ConfigError(f"run {run_id!r} does not exist; {self._known()}")
        return self._runs[run_id]

    def _adapter(self, run_id: str) -> tuple[str, LoraSection]:
        run = self._run(run_id)
        if run.adapter is None or run.section is None:
            raise ConfigError(
                f"run {run_id!r} trains all weights and has no adapter; only adapters are served and dropped"
            )
        return run.adapter, run.section

    def _known(self) -> str:
        return f"known: {', '.join(self._runs)}" if self._runs else "no run exists yet"


def _load(base: Path | str, dtype: torch.dtype, computing: torch.dtype, device: str) -> PreTrainedModel:
    """The base in evaluation mode (no dropout), frozen, with packed attention: its weights in `dtype`, then as they are
    computed with."""
    attention.register()
    model = load_language_model(base, dtype=dtype, attention=attention.NAME)
    model.to(device)
    _convert(model, dtype, computing)
    model.eval()
    model.requires_grad_(False)
    check_packing(model)
    replace_norms(model)
    return model


def _convert(model: PreTrainedModel, loaded: torch.dtype, computing: torch.dtype) -> None:
    """Compute in `computing` where the model was loaded in `loaded`. What transformers keeps in another dtype stays: a
    rotary embedding's frequencies, rounded to bfloat16, turn by radians too far or too little at position 1,000, and a
    sampler does not round them."""
    if loaded == computing:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == loaded:
            tensor.data = tensor.data.to(computing)


def _layers(model: PreTrainedModel, key: str) -> Sequence[nn.Module]:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"{key}: {type(model).__name__} has no list of decoder layers called 'layers'; wanted a model that has, or "
            f"{key}=false"
        )
    return list(layers)


def _put(column_T: Array, micro: MicroBatch, values: Tensor) -> None:
    """The micro-batch's values into their places; a filler has none."""
    if len(micro.index):
        column_T[micro.index] = values.detach().cpu().numpy()


@contextmanager
def _unpacked(model: PreTrainedModel, implementation: str | None = None) -> Iterator[None]:
    """One of transformers' own attention functions, which know rows and masks instead of packed segments.

    None: the fast one, or the eager one where a model has soft caps or sinks, of which the fast one knows nothing.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    plain = capped or any(hasattr(module, "sinks") for module in model.modules())
    config._attn_implementation = implementation or ("eager" if plain else "sdpa")
    try:
        yield
    finally:
        config._attn_implementation = attention.NAME


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _until(row: Array, eos_ids: Sequence[int]) -> Array:
    """The row up to and including its first ending token."""
    ends = np.flatnonzero(np.isin(row, list(eos_ids)))
    return row[: ends[0] + 1 if len(ends) else len(row)].astype(np.int32)
