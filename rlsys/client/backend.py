"""Interface between clients and the processes of learner and samplers. Arrays and frozen dataclasses cross it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from rlsys.config import LoraSection
from rlsys.types import Array, SamplingParams

if TYPE_CHECKING:  # requests import the handles below
    from rlsys.client.requests import Request

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class About:
    """Description of a deployment and its base model."""

    base_model: str  # name given by the client that started the deployment
    folder: str  # folder or hub name from which the learner loaded it
    arch: str
    vocab_size: int
    max_length: int  # tokens of prompt + completion
    max_lora_rank: int
    lora_alpha: float
    serves_unembed: bool  # whether samplers can serve an adapter on the unembedding
    tokenizer: Mapping[str, bytes]  # name -> content of its files
    detached: str | None  # name of a deployment that keeps running until `rlsys stop`; None: it ends with its client


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """One training run on a learner."""

    model_id: str
    lora: LoraSection


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Which numbered calls of a run its learner has executed. A number that is submitted again gets the result of its
    first call, as long as the learner keeps it (rlsys/service/call_order.py); the call is not repeated."""

    next: int  # smallest number that was not executed
    pending: tuple[int, ...] = ()  # numbers of calls that arrived and have not finished, ascending

    @property
    def unused(self) -> int:
        """Smallest number above all that arrived."""
        return self.pending[-1] + 1 if self.pending else self.next


@dataclass(frozen=True, slots=True)
class SnapshotHandle:
    """One immutable version of a run's adapter, for samplers. Only the backend reads ``ref``."""

    key: str  # unique: the bits behind a key never change
    model_id: str
    version: int  # optimizer steps
    ref: object
    path: str | None = None  # path of the saved snapshot; None: not saved


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


@dataclass(frozen=True, slots=True)
class Adopted:
    """What a client took over from one that died."""

    runs: Mapping[str, RunProgress]  # by model id
    snapshot_keys: tuple[str, ...]  # of snapshots that every sampler serves


class Deployment(Protocol):
    """A running base model with a learner and samplers. Every future that fails raises an RlsysError."""

    about: About

    def create_model(
        self, lora: LoraSection, seed: int, model_id: str | None = None, tenant: str | None = None
    ) -> Future[ModelHandle]:
        """Create a run. `model_id` None: the deployment chooses it. `tenant`: who shares the learner fairly with other
        tenants; None: this client."""

    def restore_model(
        self, path: str, optimizer: bool, model_id: str | None = None, tenant: str | None = None
    ) -> Future[ModelHandle]: ...

    def submit(self, model_id: str, seq: int, request: Request[Answer]) -> Future[Answer]:
        """Send a request, which the learner executes after all smaller `seq` of this model."""

    def ship(self, fn: Callable[..., object]) -> bytes:
        """Serialize a function for the learner. Raises LossError, naming the object that cannot be pickled."""

    def open(self, path: str, tenant: str | None = None) -> Future[SnapshotHandle]:
        """Open a saved snapshot."""

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
        """(N,) float32 log-probabilities (nats) of each token given the tokens before it; the first is 0."""

    def release(self, snapshot: SnapshotHandle) -> None:
        """Release the snapshot: this client will not request it again. Never raises, never blocks."""

    def progress(self) -> Future[Mapping[str, RunProgress]]:
        """Progress of all runs on the learner, by model id."""

    def adopt(self, model_ids: Sequence[str], snapshot_keys: Sequence[str] = ()) -> Future[Adopted]:
        """Hold the runs and snapshots of a client that died. Those that are gone are left out."""

    def drop_model(self, model_id: str, seq: int) -> None:
        """Drop the run: this client will not call it after `seq`. Never raises, never blocks."""


class Backend(Protocol):
    """Finds and starts deployments."""

    def deployment(self, base_model: str) -> Deployment:
        """Return the running deployment of a base, or start one.

        Raises:
            ConfigError: no such model; the message lists the known ones.
            ClusterError: too few resources; the message names the shortfall.
        """

    def base_model_of(self, path: str) -> str:
        """Base model on which a saved state was trained."""

    def known(self) -> list[About | str]:
        """List running deployments, and names of models that can be started."""

    def close(self) -> None: ...
