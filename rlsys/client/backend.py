"""The boundary between clients and whatever runs learner and samplers. Arrays and frozen dataclasses cross it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rlsys.config import LoraSection
from rlsys.types import Array, SamplingParams

if TYPE_CHECKING:  # requests import the handles below
    from rlsys.client.requests import Request

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class About:
    """What a deployment says about its base model."""

    base_model: str  # the name under which it was asked for
    folder: str  # where its learner found it
    arch: str
    vocab_size: int
    max_length: int  # tokens of prompt + completion
    max_lora_rank: int
    lora_alpha: float
    serves_unembed: bool  # whether samplers can serve an adapter of the unembedding
    tokenizer: Mapping[str, bytes]  # name -> content of its files
    detached: str | None  # the name under which it outlives its starter, until `rlsys stop`


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """One training run on a learner."""

    model_id: str
    lora: LoraSection


@dataclass(frozen=True, slots=True)
class SnapshotHandle:
    """One immutable version of one run's adapter, for samplers. ``ref`` is the backend's own."""

    key: str  # unique: the same key is the same bits for ever
    model_id: str
    version: int  # optimizer steps
    ref: Any
    path: str | None = None  # where it is saved, if it is


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """n completions end to end, and what was asked about the prompt of N tokens; its first has no log-probability."""

    tokens: Array  # (T,) int32
    logprobs: Array  # (T,) float32
    offsets: Array  # (n + 1,)
    stop_reasons: Array  # (n,) int8, see rlsys.rollouts
    prompt_logprobs: Array | None  # (N,) float32
    topk_tokens: Array | None  # (N - 1, k) int32, of tokens 1..N-1
    topk_logprobs: Array | None  # (N - 1, k) float32


class Deployment(Protocol):
    """A running base model. Every future fails with an RlsysError."""

    about: About

    def create_model(self, lora: LoraSection, seed: int) -> Future[ModelHandle]: ...
    def restore_model(self, path: str, optimizer: bool) -> Future[ModelHandle]: ...

    def submit(self, model_id: str, seq: int, request: Request[Answer]) -> Future[Answer]:
        """Send a request, which the learner executes after all smaller `seq` of this model."""

    def ship(self, fn: Callable[..., Any]) -> bytes:
        """A function as bytes that `host` can load. Raises LossError, naming the object that cannot travel."""

    def open(self, path: str) -> Future[SnapshotHandle]:
        """A snapshot from a saved one."""

    def sample(
        self,
        snapshot: SnapshotHandle | None,
        prompt: Array,
        n: int,
        params: SamplingParams,
        prompt_logprobs: bool,
        topk: int,
    ) -> Future[SampleAnswer]: ...

    def logprobs(self, snapshot: SnapshotHandle | None, tokens: Array) -> Future[Array]:
        """(N,) float32 nats of each token given those before it; the first is 0."""

    def release(self, snapshot: SnapshotHandle) -> None:
        """No request for this snapshot will come from here any more. Never raises, never waits."""

    def drop_model(self, model_id: str, seq: int) -> None:
        """No call for this run will come from here after `seq`. Never raises, never waits."""


class Backend(Protocol):
    def deployment(self, base_model: str) -> Deployment:
        """The running deployment of a base, or a new one.

        Raises:
            ConfigError: no such model; the message lists the known ones.
            ClusterError: too few resources; the message has the shortfall.
        """

    def base_model_of(self, path: str) -> str:
        """The base that a saved state was trained on."""

    def known(self) -> list[About | str]:
        """Running deployments, and names of models that can be started."""

    def close(self) -> None: ...
