"""Requests, training client -> learner. A ``Request[A]`` is answered with an ``A`` or fails with an RlsysError."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from rlsys.client.backend import SnapshotHandle
from rlsys.types import AdamParams, BatchResult, Datum

if TYPE_CHECKING:
    from rlsys.datums import DatumBatch
    from rlsys.losses import Loss

Answer_co = TypeVar("Answer_co", covariant=True)


class Request(Generic[Answer_co]):
    """Base of all requests. `op`: its name in messages."""

    __slots__ = ()
    op: ClassVar[str]


@dataclass(frozen=True, slots=True)
class Forward(Request[BatchResult]):
    op = "forward"
    batch: DatumBatch
    loss: Loss


@dataclass(frozen=True, slots=True)
class ForwardBackward(Request[BatchResult]):
    op = "forward_backward"
    batch: DatumBatch
    loss: Loss


@dataclass(frozen=True, slots=True)
class ForwardBackwardCustom(Request[BatchResult]):
    op = "forward_backward_custom"
    batch: DatumBatch
    data: Sequence[Datum]
    fn: bytes  # as ``Deployment.ship`` gives it


@dataclass(frozen=True, slots=True)
class OptimStep(Request[dict[str, float]]):
    """Answered with metrics."""

    op = "optim_step"
    adam: AdamParams


@dataclass(frozen=True, slots=True)
class SaveState(Request[str]):
    """Answered with the path, as for SaveWeightsForSampler."""

    op = "save_state"
    name: str
    overwrite: bool


@dataclass(frozen=True, slots=True)
class SaveWeightsForSampler(Request[str]):
    op = "save_weights_for_sampler"
    name: str
    overwrite: bool


@dataclass(frozen=True, slots=True)
class SaveFolder(Request[str]):
    """As SaveState or SaveWeightsForSampler, in a folder that the caller chose."""

    op = "save"
    folder: str
    optimizer: bool
    overwrite: bool


@dataclass(frozen=True, slots=True)
class LoadState(Request[str]):
    op = "load_state"
    path: str
    optimizer: bool


@dataclass(frozen=True, slots=True)
class TakeSnapshot(Request[SnapshotHandle]):
    op = "snapshot"
    name: str | None = None  # under which it is saved, too


@dataclass(frozen=True, slots=True)
class Drop(Request[None]):
    """Last request of a run."""

    op = "drop"


@dataclass(frozen=True, slots=True)
class Skip(Request[None]):
    """Takes the turn of a call that was refused before it was sent."""

    op = "skip"
