"""Stages of the training loop as Protocols, and the references that travel between them.

A stage returns references to columnar data, which stays in the cluster's object store, and `metrics`, a few numbers for
the loop. The loop passes references on and never reads behind them. `actors/stages` implements the Protocols on Ray.

    samplers --RolloutsRef--> graders --RewardsRef--> advantages --DatumsRef--> learner --PublishedAdapter--> samplers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from rlsys.datums import DatumBatch
from rlsys.metrics import Metrics, reduce_metrics
from rlsys.rollouts import Rollouts
from rlsys.run_state.ledger import Ledger
from rlsys.types import Array, SamplingParams

if TYPE_CHECKING:
    from rlsys.weight_sync.update import WeightUpdate

T = TypeVar("T")


@dataclass(frozen=True)  # no slots: with them Python 3.11 cannot make a `Ref[T](...)`
class Ref(Generic[T]):
    """Reference to a T in the object store. `value` is Ray's ObjectRef, which only `actors` may import."""

    value: Any  # whose type `rlsys` must not import


@dataclass(frozen=True, slots=True)
class RolloutsRef:
    """Samplers -> graders, advantages, learner: completions in parts, in the order of their problems."""

    refs: tuple[Ref[Rollouts], ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class RewardsRef:
    """Graders -> advantages: (R,) rewards, and per group what the loop and its reports need of them."""

    refs: tuple[Ref[Array], ...]
    metrics: Metrics
    grade: Array  # (P,) float64, mean grade: the task's grade, without other terms of the reward
    passed: Array  # (P,) int64, completions whose grade is rewards.solved_at or more
    idle: Array  # (P,) bool, no gradient comes from the group: see rlsys.advantages.groups_without_gradient


@dataclass(frozen=True, slots=True)
class LogprobsRef:
    """Learner -> advantages, samples: log-probabilities of tokens, under the reference or under the learner (p)."""

    refs: tuple[Ref[Array], ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class DatumsRef:
    """Advantages -> learner: one batch per minibatch, in the order in which the learner takes them."""

    batches: tuple[Ref[DatumBatch], ...]
    metrics: Metrics
    rows: tuple[Ref[Array], ...]  # (D,) of each minibatch: the completion that each datum comes from
    outcomes: Array  # (P,) int8, outcome of each group, as ``Ledger.settle`` takes it


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """Learner -> samplers: an adapter, and what every sampler has to attest."""

    ref: Ref[WeightUpdate]
    version: int
    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TrainedStep:
    """A step as an observer sees it. Groups are in the order sampled; ``learned`` has the learner's p of each datum."""

    version: int  # of the learner when the step began
    problems: Array  # (P,) ids
    rollouts: RolloutsRef
    rewards: RewardsRef
    reference: LogprobsRef | None
    datums: Sequence[DatumsRef]
    learned: Sequence[LogprobsRef]


class Samplers(Protocol):
    @property
    def version(self) -> int:
        """The version that is loaded."""

    def load(self, update: PublishedAdapter) -> Metrics:
        """Serve the update's version from now on; running requests continue. Raises WeightSyncError unless every
        sampler attests it."""

    def submit(
        self,
        split: str,
        problems: Array,
        n: int,
        params: SamplingParams,
        occurrence: Array | None = None,
        urgent: bool = False,
    ) -> int:
        """(P,) problem ids: have n completions of each sampled, without waiting for them. Returns a ticket.

        A completion is a function of `params.seed`, the problem, its occurrence and the version that is loaded when its
        group starts. `occurrence` (P,) counts how often each problem was sampled before under this seed. None: never
        before, so only repeats in `problems` count. `urgent`: before groups that no sampler has yet.
        """

    def wait(self, ticket: int) -> RolloutsRef:
        """The completions of a ticket."""

    def collect(self, timeout_s: float) -> list[tuple[int, RolloutsRef]]:
        """Tickets that are done; waits for the first one up to `timeout_s`."""

    def forget(self) -> None:
        """Drop all outstanding tickets."""


class Graders(Protocol):
    def grade(self, split: str, rollouts: RolloutsRef) -> RewardsRef:
        """Rollouts -> (R,) rewards."""


class Advantages(Protocol):
    def compute_advantages(
        self, rollouts: RolloutsRef, rewards: RewardsRef, reference: LogprobsRef | None, num_minibatches: int
    ) -> DatumsRef:
        """Rollouts and rewards (and log-probabilities of the reference, if there is a KL penalty) -> datums."""


@dataclass(frozen=True, slots=True)
class MinibatchPosition:
    """Position of a minibatch in its step."""

    step: int  # 1, 2, ...
    substep: int  # 0 .. rl.substeps - 1
    first: bool  # of the substep's minibatches
    last: bool  # the optimizer steps after it
    on_policy: bool  # every token was sampled with the learner's present weights, so p must be q

    @property
    def begins_step(self) -> bool:
        return self.first and self.substep == 0


class Learner(Protocol):
    def reference(self, rollouts: RolloutsRef) -> LogprobsRef:
        """(T,) log-probabilities of the completions' tokens under the reference."""

    def learn(self, datums: Ref[DatumBatch], position: MinibatchPosition) -> LogprobsRef:
        """forward_backward, and the optimizer's step after the last minibatch: (T,) the learner's p."""

    def publish(self) -> PublishedAdapter:
        """The present adapter as a WeightUpdate."""

    def state(self) -> Any:
        """Reference to the present state, for `Checkpointer.save` alone; later steps do not change it. Any: what it is
        depends on the learner, and the loop only passes it on."""

    def restore(self) -> None:
        """Roll back to the last checkpoint.

        Raises:
            RolledBack: always, with the step of the checkpoint.
        """


class Checkpointer(Protocol):
    done: int  # step of the last checkpoint; -1: none yet, not even of the evaluation before the first step

    def save(self, step: int, ledger: Ledger, state: Any) -> None:
        """Checkpoint a finished step: an interrupted run resumes there. May return before the files are written. Any:
        as `Learner.state`."""


class Observer(Protocol):
    def on_rollback(self, step: int) -> None: ...
    def on_step(self, step: int, metrics: Metrics, trained: TrainedStep) -> None: ...
    def on_eval(self, step: int, metrics: Metrics, rollouts: RolloutsRef, rewards: RewardsRef) -> None: ...


@dataclass(frozen=True, slots=True)
class Stages:
    samplers: Samplers
    graders: Graders
    advantages: Advantages
    learner: Learner
    checkpointer: Checkpointer


class RolledBack(Exception):
    """A stage lost state and has recovered. `step`: the learner was rolled back to this step; redo later ones. None:
    the learner kept its state; redo the current step."""

    def __init__(self, step: int | None) -> None:
        super().__init__(step)
        self.step = step


def concatenate_rollouts(parts: Sequence[RolloutsRef]) -> RolloutsRef:
    """Parts of one batch, in the order sampled."""
    refs = tuple(ref for part in parts for ref in part.refs)
    return RolloutsRef(refs, reduce_metrics([part.metrics for part in parts]))


def concatenate_rewards(parts: Sequence[RewardsRef]) -> RewardsRef:
    refs = tuple(ref for part in parts for ref in part.refs)
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("grade", "passed", "idle"))
    return RewardsRef(refs, reduce_metrics([part.metrics for part in parts]), *columns)


def concatenate_logprobs(parts: Sequence[LogprobsRef]) -> LogprobsRef:
    refs = tuple(ref for part in parts for ref in part.refs)
    return LogprobsRef(refs, reduce_metrics([part.metrics for part in parts]))
