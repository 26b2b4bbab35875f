"""Losses of a batch, and their gradients added to those that a run has accumulated since its last step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlsys import losses
from rlsys.datums import DatumBatch
from rlsys.distributed.ranks import Ranks
from rlsys.learner import loss_scale
from rlsys.learner.custom_loss import CustomLoss, CustomLossValue, compute_custom_loss, result_metrics
from rlsys.learner.forward import ForwardPass, Progress
from rlsys.learner.graph_cache import GraphCache
from rlsys.learner.packing import MicroBatch
from rlsys.learner.runs import Run
from rlsys.learner.turns import DeferredFailure, Turns
from rlsys.losses import Loss
from rlsys.types import BatchResult, Datum
from rlsys.utils.free_memory import free_bytes
from rlsys.utils.gpu_memory import unused_bytes

Where = Literal["all", "weighted"]


class GradientAccumulation:
    """Loss and gradient, micro-batch by micro-batch. A batch that fails or is closed leaves a run's gradient unchanged.

    Each pass pauses after every micro-batch (rlsys/learner/turns.py). Its run must be active in every turn.

    `dtype`: of trained weights.
    """

    def __init__(self, forward: ForwardPass, ranks: Ranks, dtype: torch.dtype, progress: Progress) -> None:
        self._forward, self._ranks, self._progress = forward, ranks, progress
        self._logprob_dtype = np.float64 if dtype == torch.float64 else np.float32
        self._scales = forward.model.dtype == torch.float16
        self._keeps_graphs = forward.section.custom_graph_gb != 0

    def loss(self, batch: DatumBatch, loss: Loss, temperature: float, where: Where) -> Turns[BatchResult]:
        """The loss without gradients."""
        return self._forward.budget.fitting_turns(lambda: self._pass(batch, loss, temperature, where))

    def add(self, run: Run, batch: DatumBatch, loss: Loss, temperature: float, where: Where) -> Turns[BatchResult]:
        """The loss; its gradient is added to the run's."""

        def work() -> Turns[BatchResult]:
            with _accumulating(run):
                return (yield from self._pass(batch, loss, temperature, where, run))

        return self._forward.budget.fitting_turns(work)

    def add_custom(
        self, run: Run, batch: DatumBatch, data: Sequence[Datum], fn: CustomLoss, temperature: float
    ) -> Turns[BatchResult]:
        """The same for a custom loss."""

        def work() -> Turns[BatchResult]:
            with _accumulating(run):
                return (yield from self._custom_pass(run, batch, data, fn, temperature))

        return self._forward.budget.fitting_turns(work, instead=self._give_up_graphs)

    def _pass(
        self, batch: DatumBatch, loss: Loss, temperature: float, where: Where, run: Run | None = None
    ) -> Turns[BatchResult]:
        """The loss; with a run, its gradient too."""
        wanted_T = batch.columns["weights"] != 0 if where == "weighted" else None
        wants_entropy, device = self._forward.section.entropy, self._forward.model.device
        logp_T = np.zeros(len(batch.tokens), np.float64)
        values_T = np.zeros(len(batch.tokens), np.float64)
        entropy_T = np.zeros(len(batch.tokens) if wants_entropy else 0, np.float64)
        overflows = np.zeros(1)
        inputs = dict(batch.columns)
        if loss.is_per_sequence:
            inputs[losses.SEQUENCE] = np.repeat(np.arange(batch.num_datums), batch.lengths)

        def add(micro: MicroBatch) -> None:
            logp, entropy = self._forward.logprobs_and_entropy(micro, temperature)
            if len(micro.index) == 0:
                values = 0.0 * logp
            else:
                columns = {key: torch.from_numpy(column[micro.index]).to(device) for key, column in inputs.items()}
                values = loss(logp, columns)
            if run is not None and self._scales:
                (slope,) = torch.autograd.grad(values.sum(), logp)
                overflows[:] += self._backward_scaled(run, micro, temperature, logp, slope)
            elif run is not None:
                self._backward(values.sum())
            micro.scatter(logp_T, logp.double())
            micro.scatter(values_T, values.double())
            if wants_entropy:
                micro.scatter(entropy_T, entropy.double())

        with self._ranks.joint(logp_T, values_T, entropy_T, overflows):
            failure = DeferredFailure(self._ranks)
            for micro in self._forward.micro_batches_by_turn(batch, wanted_T):
                if micro is not None:
                    with torch.set_grad_enabled(run is not None):  # not across a pause: other runs' work follows
                        failure.attempt(partial(add, micro))
                yield _tokens(micro)
            failure.raise_deferred()
        metrics = {"loss:sum": float(values_T.sum()), **losses.metrics(loss, logp_T, inputs)}
        if wants_entropy:
            counts_T = batch.columns["weights"] != 0
            metrics["entropy:mean"] = float(entropy_T[counts_T].sum() / max(1, np.count_nonzero(counts_T)))
        if run is not None and self._scales:
            metrics["overflows:sum"] = float(overflows[0])
        return BatchResult(metrics["loss:sum"], metrics, logp_T.astype(np.float32))

    def _custom_pass(
        self, run: Run, batch: DatumBatch, data: Sequence[Datum], fn: CustomLoss, temperature: float
    ) -> Turns[BatchResult]:
        by_turn = self._forward.micro_batches_by_turn(batch)
        micros = [micro for micro in by_turn if micro is not None]
        p_T = np.zeros(len(batch.tokens), self._logprob_dtype)
        repeated = np.zeros(1, p_T.dtype)  # micro-batches that run forward twice, of all ranks
        logps: list[Tensor] = []
        graphs = GraphCache(self._graph_bytes() if len(micros) > 1 else 0, self._forward.model.parameters())

        def forward(micro: MicroBatch) -> None:
            if len(logps) < len(micros) - 1:
                work = partial(self._forward.logprobs, micro, temperature)
                logp = graphs.forward(work, micro.tokens.shape[1])
            else:  # the last graph is always kept: its backward pass, which comes first, needs that memory anyway
                logp = self._forward.logprobs(micro, temperature)
            micro.scatter(p_T, logp)
            repeated[:] += not logp.requires_grad
            logps.append(logp)

        with self._ranks.joint(p_T, repeated):
            failure = DeferredFailure(self._ranks)
            for micro in by_turn:
                if micro is not None:
                    failure.attempt(partial(forward, micro))
                yield _tokens(micro)
            failure.raise_deferred()
        values: list[CustomLossValue] = []
        overflows = np.zeros(1)

        def backward(micro: MicroBatch) -> None:
            logp, slope_T = logps.pop(), torch.cat(values[0].slopes)
            if not logp.requires_grad:
                logp = self._forward.logprobs(micro, temperature)
            slope = slope_T[torch.from_numpy(micro.index)] if len(micro.index) else torch.zeros(1)
            if self._scales:
                overflows[:] += self._backward_scaled(run, micro, temperature, logp, slope.to(logp))
            else:
                self._backward(logp, slope.to(logp))

        with self._ranks.joint(overflows):
            failure = DeferredFailure(self._ranks)
            split = torch.from_numpy(p_T).split(batch.lengths.tolist())
            failure.attempt(lambda: values.append(compute_custom_loss(fn, data, split)))
            for micro in reversed(by_turn):
                if micro is not None:
                    failure.attempt(partial(backward, micro))
                yield _tokens(micro)
            failure.raise_deferred()
        metrics = result_metrics(values[0].loss, values[0].metrics, 2 if repeated[0] else 1)
        if self._scales:
            metrics["overflows:sum"] = float(overflows[0])
        return BatchResult(values[0].loss, metrics, p_T.astype(np.float32))

    def _graph_bytes(self) -> int:
        """Bytes that a custom loss may keep in graphs; 0 if the base is sharded, which allows one forward pass at a
        time."""
        wanted = self._forward.section.custom_graph_gb
        if self._ranks.shards or not self._keeps_graphs:
            return 0
        if wanted is not None:
            return int(wanted * 2**30)
        if self._forward.model.device.type == "cuda":
            return unused_bytes() // 2
        return free_bytes() // 2 // self._ranks.size

    def _give_up_graphs(self) -> bool:
        """After out-of-memory, keep no more graphs. Returns whether any were kept; all ranks return the same."""
        given_up, self._keeps_graphs = self._keeps_graphs and not self._ranks.shards, False
        return given_up

    def _backward(self, values: Tensor, slope: Tensor | None = None) -> None:
        with self._ranks.guard("the backward pass"):
            values.backward(slope)
        self._progress.advance()

    def _backward_scaled(self, run: Run, micro: MicroBatch, temperature: float, logp: Tensor, slope: Tensor) -> int:
        """Backward pass in float16 (rlsys/learner/loss_scale.py). Returns the number of overflows, after each of which
        the pass is repeated at a lower scale. A gradient that is not finite at the least scale stays so, and
        ``optim_step`` refuses it."""
        scale, overflows, earlier = loss_scale.first_scale(slope), 0, run.take_gradients()
        least = scale * loss_scale.LEAST
        while True:
            self._backward(logp, slope * scale)
            finite = loss_scale.are_finite(weight.grad for weight in run.parameters.values() if weight.grad is not None)
            if self._ranks.shards:  # all ranks take part in every forward pass, so they decide together
                failed = torch.tensor([float(not finite)])
                self._ranks.sum_([failed])
                finite = not failed
            if finite or scale / loss_scale.LOWER < least:
                break
            run.take_gradients()
            scale, overflows = scale / loss_scale.LOWER, overflows + 1
            logp = self._forward.logprobs(micro, temperature)
        for weight in run.parameters.values():
            if weight.grad is not None:
                weight.grad.div_(scale)
        run.add_gradients(earlier)
        return overflows


def _tokens(micro: MicroBatch | None) -> int:
    return 0 if micro is None else micro.tokens.shape[1]


@contextmanager
def _accumulating(run: Run) -> Iterator[None]:
    """Add the gradient of the complete block to the run's; if the block fails, the run's is unchanged."""
    earlier = run.take_gradients()
    try:
        yield
    except BaseException:  # an interrupt too must not leave the gradient of half a batch
        run.set_gradients(earlier)
        raise
    run.add_gradients(earlier)
    run.has_gradient = True
