"""What the loop is made of: the stages as Protocols, and what they hand on.

What a stage hands to the next is a reference to columnar data that stays where it was made; what it tells the loop is
`facts`, a few numbers. The in-cluster implementations live in `actors/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlsys.metrics import Metrics, reduce_metrics
from rlsys.run_state.ledger import Ledger
from rlsys.types import Array, SamplingParams


@dataclass(frozen=True, slots=True)
class BatchRef:
    """What a stage made: references to the data, which the loop only passes on, and a few facts about it."""

    refs: tuple[Any, ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class RewardsRef(BatchRef):
    """(R,) rewards, and what of them the loop and its reports need of each of the P groups."""

    grade: Array  # (P,) float64, mean grade: the task's own, without other terms of the reward
    passed: Array  # (P,) int64, completions whose grade is rewards.solved_at or more
    idle: Array  # (P,) bool, the group teaches nothing: see rlsys.advantages.groups_without_gradient


@dataclass(frozen=True, slots=True)
class DatumsRef(BatchRef):
    """Datums: a reference to each piece, in the order in which they are learned from."""

    rows: Any  # a reference to each piece's (D,) numbers of completions
    outcomes: Array  # (P,) int8, what became of each group, as ``Ledger.settle`` takes it


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """An adapter on its way to the samplers: a reference to the WeightUpdate, and what every sampler has to attest."""

    ref: Any
    version: int
    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TrainedStep:
    """A step as an observer sees it. Groups are in the order drawn; ``learned`` holds the learner's p of each datum."""

    version: int  # of the learner when the step began
    problems: Array  # (P,) ids
    rollouts: BatchRef
    rewards: RewardsRef
    reference: BatchRef | None
    datums: Sequence[DatumsRef]
    learned: Sequence[BatchRef]


class Samplers(Protocol):
    @property
    def version(self) -> int:
        """The one that is loaded."""

    def sample(
        self, split: str, problems: Array, n: int, params: SamplingParams, occurrence: Array | None = None
    ) -> BatchRef:
        """(P,) problem ids -> Rollouts, n completions each, under the version that is loaded.

        A draw is a function of `params.seed`, the problem and its occurrence, `occurrence` (P,) counting what was drawn
        before under this seed; None: nothing was, so a problem's place among its like in `problems` counts.
        """

    def load(self, update: PublishedAdapter) -> Metrics:
        """Serve the update's version from now on; every sampler attests it, or this raises WeightSyncError. What is
        running goes on."""

    def submit(
        self, split: str, problems: Array, n: int, params: SamplingParams, occurrence: Array | None = None
    ) -> int:
        """As `sample`, without waiting: a ticket. Each group starts on the version that is loaded when it starts."""

    def collect(self, timeout_s: float) -> list[tuple[int, BatchRef]]:
        """Tickets that are done; tends the samplers for at most that long, and returns at once when one is done."""

    def forget(self) -> None:
        """Nobody waits for the tickets that are out any more."""


class Graders(Protocol):
    def grade(self, split: str, rollouts: BatchRef) -> RewardsRef:
        """Rollouts -> (R,) rewards."""


class Advantages(Protocol):
    def compute_advantages(
        self, rollouts: BatchRef, rewards: BatchRef, reference: BatchRef | None, num_minibatches: int
    ) -> DatumsRef:
        """Rollouts and rewards (and log-probabilities of the reference, if a KL penalty is asked for) -> datums."""


@dataclass(frozen=True, slots=True)
class MinibatchPosition:
    """Where a piece of a batch stands in its step."""

    step: int  # 1, 2, ...
    substep: int  # 0 .. rl.substeps - 1
    first: bool  # of the substep's pieces
    last: bool  # the optimizer steps after it
    on_policy: bool  # the learner's weights are those that drew every token, so p must be q

    @property
    def begins_step(self) -> bool:
        return self.first and self.substep == 0


class Learner(Protocol):
    def reference(self, rollouts: BatchRef) -> BatchRef:
        """(T,) log-probabilities of the completions' tokens under the reference."""

    def learn(self, datums: Any, position: MinibatchPosition) -> BatchRef:
        """forward_backward, and the optimizer's step after the last piece: (T,) the learner's p, and facts."""

    def publish(self) -> PublishedAdapter:
        """The adapter as it is now, as a WeightUpdate."""

    def state(self) -> Any:
        """A reference to what a checkpoint keeps, as of now: later steps do not touch it."""

    def restore(self) -> None:
        """Go back to the last checkpoint.

        Raises:
            Rewound: always, with the step that the learner now stands after.
        """


class Checkpointer(Protocol):
    done: int  # the step of the last checkpoint; -1: not even the evaluation before the first step has one

    def save(self, step: int, ledger: Ledger, state: Any) -> None:
        """The last act of a step: what an interrupted run goes on from. May go on being written while others work."""


class Observer(Protocol):
    def on_rollback(self, step: int) -> None: ...
    def on_step(self, step: int, metrics: Metrics, trained: TrainedStep) -> None: ...
    def on_eval(self, step: int, metrics: Metrics, rollouts: BatchRef, rewards: RewardsRef) -> None: ...


@dataclass(frozen=True, slots=True)
class Stages:
    samplers: Samplers
    graders: Graders
    advantages: Advantages
    learner: Learner
    checkpointer: Checkpointer


class RolledBack(Exception):
    """Raised by a stage that lost something and is whole again: the learner stands after `step`, what came later is to
    be done again. None: it stands where it stood, and only the step in hand is lost."""

    def __init__(self, step: int | None) -> None:
        super().__init__(step)
        self.step = step


def concatenate_batches(parts: Sequence[BatchRef]) -> BatchRef:
    """Parts of one batch, in the order drawn."""
    return BatchRef(tuple(ref for part in parts for ref in part.refs), reduce_metrics([part.metrics for part in parts]))


def concatenate_rewards(parts: Sequence[RewardsRef]) -> RewardsRef:
    whole = concatenate_batches(parts)
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("grade", "passed", "idle"))
    return RewardsRef(whole.refs, whole.metrics, *columns)
