"""Training client: trains one adapter on a deployment's learner.

Each call gets a sequence number when it is submitted, and the learner executes calls in this order, for any number of
threads, tasks and pending calls. So ``forward_backward`` and ``optim_step`` can be submitted together.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, cast

import numpy as np

from rlsys import datums, losses
from rlsys.client import requests
from rlsys.client.backend import Answer, Deployment, ModelHandle, SnapshotHandle
from rlsys.client.containers import by_datum, outputs
from rlsys.client.futures import ApiFuture, Ready
from rlsys.client.paths import given
from rlsys.client.requests import Request
from rlsys.client.results import (
    GetInfoResponse,
    LoadWeightsResponse,
    ModelData,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from rlsys.client.sampling import SamplingClient
from rlsys.client.tokenizing import tokenizer_of
from rlsys.errors import ConfigError
from rlsys.types import AdamParams, BatchResult, Datum, ForwardBackwardOutput, OptimStepResponse

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlsys.datums import DatumBatch
    from rlsys.learner import custom_loss
    from rlsys.losses import Loss

Where = Literal["learner", "caller"]
CustomLoss: TypeAlias = "Callable[[list[Datum], list[Tensor]], tuple[Tensor, Mapping[str, float]]]"
Response = TypeVar("Response")
Result = ApiFuture[ForwardBackwardOutput]


class TrainingClient(Ready):
    """Training client of one run, created by `ServiceClient`. Safe to use from several threads and event loops."""

    def __init__(self, deployment: Deployment, model: ModelHandle, check_open: Callable[[], None]) -> None:
        self._deployment, self._model, self._check_open = deployment, model, check_open
        self._numbers = itertools.count(1)
        self._entering = threading.Lock()
        weakref.finalize(self, _drop, deployment, model.model_id, self._numbers).atexit = False

    @property
    def model_id(self) -> str:
        return self._model.model_id

    def forward(self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None) -> Result:
        """Compute the loss and per-token log-probabilities (nats) without gradients. Raises as `forward_backward`."""
        return self._pass(requests.Forward, data, loss_fn, loss_fn_config)

    async def forward_async(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Result:
        return self.forward(data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Result:
        """Compute the loss, summed over positions and datums, and add its gradient to the accumulated gradient.

        Raises:
            LossError: no such loss, or an invalid `loss_fn_config`.
            MissingInputError: a datum lacks an input of the loss.
            DatumError: a datum is invalid; the message has its index, the key, what was found and what was wanted. No
                gradient is added.
        """
        return self._pass(requests.ForwardBackward, data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Result:
        return self.forward_backward(data, loss_fn, loss_fn_config)

    def forward_backward_custom(self, data: Sequence[Datum], fn: CustomLoss, where: Where = "learner") -> Result:
        """As `forward_backward`, with ``fn(data, logprobs) -> (loss, metrics)`` as the loss of all datums together.

        ``logprobs[d]``: (N_d,) float32 torch tensor, in nats. `where`: "learner" sends `fn` to the learner, where also
        its side effects happen; "caller" runs it in this process, between a forward and a backward pass.

        Raises:
            LossError: `fn` cannot be pickled. Raised by the future: `fn` failed or returned an invalid value.
            DatumError: as `forward_backward`.
        """
        if where == "learner":
            return self._custom_at_learner(list(data), fn)
        if where == "caller":
            return self._custom_at_caller(list(data), fn)
        raise ConfigError(f"where: found {where!r}; wanted 'learner' or 'caller'")

    async def forward_backward_custom_async(
        self, data: Sequence[Datum], fn: CustomLoss, where: Where = "learner"
    ) -> Result:
        return self.forward_backward_custom(data, fn, where)

    def optim_step(self, adam_params: AdamParams) -> ApiFuture[OptimStepResponse]:
        """Apply the accumulated gradient with one AdamW step, and clear it.

        Raised by the future:
            GradientError: there is no gradient, or its norm is not finite. Weights and optimizer state do not change.
        """
        if not isinstance(adam_params, AdamParams):
            raise ConfigError(f"adam_params: found a {type(adam_params).__name__}; wanted AdamParams(...)")
        return self._call(requests.OptimStep(adam_params), OptimStepResponse)

    async def optim_step_async(self, adam_params: AdamParams) -> ApiFuture[OptimStepResponse]:
        return self.optim_step(adam_params)

    def save_state(
        self, name: str, ttl_seconds: int | None = None, overwrite: bool = False
    ) -> ApiFuture[SaveWeightsResponse]:
        """Save weights and optimizer state as of the last `optim_step`, as ``rlsys://<model id>/weights/<name>``.

        Raised by the future:
            CheckpointError: the name is in use or invalid.
        """
        _note_ttl(ttl_seconds)
        return self._call(requests.SaveState(name, overwrite), SaveWeightsResponse)

    async def save_state_async(
        self, name: str, ttl_seconds: int | None = None, overwrite: bool = False
    ) -> ApiFuture[SaveWeightsResponse]:
        return self.save_state(name, ttl_seconds, overwrite)

    def load_state(self, path: str) -> ApiFuture[LoadWeightsResponse]:
        """Load the weights of a saved state. The optimizer state is reset and the accumulated gradient is cleared.

        Raised by the future:
            CheckpointError: the state is damaged, or belongs to another base, rank or targets. The run does not change.
        """
        return self._call(requests.LoadState(given(path), False), LoadWeightsResponse)

    async def load_state_async(self, path: str) -> ApiFuture[LoadWeightsResponse]:
        return self.load_state(path)

    def load_state_with_optimizer(self, path: str) -> ApiFuture[LoadWeightsResponse]:
        """As `load_state`, and also load the saved optimizer state."""
        return self._call(requests.LoadState(given(path), True), LoadWeightsResponse)

    async def load_state_with_optimizer_async(self, path: str) -> ApiFuture[LoadWeightsResponse]:
        return self.load_state_with_optimizer(path)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, overwrite: bool = False
    ) -> ApiFuture[SaveWeightsForSamplerResponse]:
        """Save the weights for ``create_sampling_client(model_path=...)``. Raises as `save_state` does."""
        _note_ttl(ttl_seconds)
        return self._call(requests.SaveWeightsForSampler(name, overwrite), SaveWeightsForSamplerResponse)

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None, overwrite: bool = False
    ) -> ApiFuture[SaveWeightsForSamplerResponse]:
        return self.save_weights_for_sampler(name, ttl_seconds, overwrite)

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        """Create a sampling client on a snapshot of the current weights. The snapshot is saved only if `name` is
        given."""
        return self._snapshot(name).result()

    async def save_weights_and_get_sampling_client_async(self, name: str | None = None) -> SamplingClient:
        return await self._snapshot(name)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, loaded with transformers."""
        return tokenizer_of(self._deployment.about)

    def get_info(self) -> GetInfoResponse:
        about, lora = self._deployment.about, self._model.lora
        data = ModelData(about.arch, about.base_model, about.folder)
        return GetInfoResponse(data, self.model_id, about.base_model, lora.rank, lora.alpha)

    async def get_info_async(self) -> GetInfoResponse:
        return self.get_info()

    def _pass(
        self,
        kind: type[requests.Forward | requests.ForwardBackward],
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
    ) -> Result:
        def request() -> Request[BatchResult]:
            return kind(*_batch(self._deployment, kept, loss_fn, loss_fn_config))

        kept = list(data)
        return self._call(request, lambda answer: _output(kept, answer))

    def _custom_at_learner(self, data: list[Datum], fn: CustomLoss) -> Result:
        def request() -> Request[BatchResult]:
            from rlsys.learner.custom_loss import collate_custom

            about = self._deployment.about
            batch = collate_custom(data, vocab_size=about.vocab_size, max_length=about.max_length)
            return requests.ForwardBackwardCustom(batch, data, self._deployment.ship(fn))

        return self._call(request, lambda answer: _output(data, answer))

    def _custom_at_caller(self, data: list[Datum], fn: CustomLoss) -> Result:
        """Forward at the learner, `fn` here, backward at the learner. Both sequence numbers are taken at once, so that
        calls submitted later are executed after both passes."""
        from rlsys.learner.custom_loss import collate_custom, result_metrics, surrogate_data, surrogate_weights

        about, result = self._deployment.about, Future[BatchResult]()
        with self._entering:
            self._check_open()
            first, second = next(self._numbers), next(self._numbers)
        try:
            collate_custom(data, vocab_size=about.vocab_size, max_length=about.max_length)
            plain = surrogate_data(data, [np.ones(datum.model_input.length, np.float32) for datum in data])
            unweighted = requests.Forward(*_batch(self._deployment, plain, "cross_entropy", None))
            forward = self._submit(first, unweighted)
        except BaseException:
            self._skip(first)
            self._skip(second)
            raise

        def between() -> None:
            submitted = False
            try:
                passed = forward.result()
                logprobs = by_datum(plain, passed.logprobs)
                surrogate = surrogate_weights(data, logprobs, cast("custom_loss.CustomLoss", fn))  # `data` is a list
                weighted = surrogate_data(data, surrogate.weights)
                request = requests.ForwardBackward(*_batch(self._deployment, weighted, "cross_entropy", None))
                backward, submitted = self._submit(second, request), True
                answer = backward.result()
                metrics = result_metrics(surrogate.loss, surrogate.metrics, 2)
                result.set_result(BatchResult(surrogate.loss, metrics, answer.logprobs))
            except BaseException as error:  # edge of a thread: the error belongs to the holder of the future
                if not submitted:
                    self._skip(second)
                result.set_exception(error)

        threading.Thread(target=between, name="rlsys-custom-loss", daemon=True).start()
        return ApiFuture(
            result, self._named(requests.ForwardBackwardCustom), lambda answer: _output(data, answer), self
        )

    def _snapshot(self, name: str | None) -> ApiFuture[SamplingClient]:
        def client(snapshot: SnapshotHandle) -> SamplingClient:
            return SamplingClient(self._deployment, snapshot, self._check_open)

        return self._call(requests.TakeSnapshot(name), client)

    def _call(
        self, request: Request[Answer] | Callable[[], Request[Answer]], read: Callable[[Answer], Response]
    ) -> ApiFuture[Response]:
        """Take a sequence number, prepare the request, send. If preparing fails, a Skip uses up the number."""
        with self._entering:
            self._check_open()
            seq = next(self._numbers)
        try:
            ready = request if isinstance(request, Request) else request()
            answer = self._submit(seq, ready)
        except BaseException:
            self._skip(seq)
            raise
        return ApiFuture(answer, self._named(type(ready)), read, self)

    def _submit(self, seq: int, request: Request[Answer]) -> Future[Answer]:
        return self._deployment.submit(self.model_id, seq, request)

    def _skip(self, seq: int) -> None:
        self._submit(seq, requests.Skip())

    def _named(self, kind: type[Request[Answer]]) -> str:
        return f"training client {self.model_id}: {kind.op}"


def _drop(deployment: Deployment, model_id: str, numbers: Iterator[int]) -> None:
    deployment.drop_model(model_id, next(numbers))


def _batch(
    deployment: Deployment, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None
) -> tuple[DatumBatch, Loss]:
    """The batch and its loss, validated against loss and model."""
    loss = losses.resolve(loss_fn, loss_fn_config)
    about = deployment.about
    return datums.collate(data, loss, vocab_size=about.vocab_size, max_length=about.max_length), loss


def _output(data: Sequence[Datum], answer: BatchResult) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(answer.loss_sum, dict(answer.metrics), outputs(data, answer.logprobs))


def _note_ttl(ttl_seconds: int | None) -> None:
    if ttl_seconds is not None:
        warnings.warn(
            f"ttl_seconds={ttl_seconds} has no effect: checkpoints are files that are kept until you delete them",
            stacklevel=3,
        )
