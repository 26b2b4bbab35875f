"""What the loop is made of: the stages as Protocols, and what they hand on.

What a stage hands to the next is a reference to columnar data that stays where it was made; what it tells the loop is
`facts`, a few numbers. The in-cluster implementations live in `actors/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.ledger import Ledger
from rlsys.types import Array, SamplingParams

Facts = Mapping[str, float]  # names are listed in docs/metrics.md


@dataclass(frozen=True, slots=True)
class Made:
    """What a stage made: a reference to the data, which the loop only passes on, and a few facts about it."""

    ref: Any
    facts: Facts


@dataclass(frozen=True, slots=True)
class Centred(Made):
    """Datums, and what became of each group: (P,) int8, as ``Ledger.settle`` takes it."""

    outcomes: Array


@dataclass(frozen=True, slots=True)
class Published:
    """An adapter on its way to the samplers: a reference to the WeightUpdate, and what every sampler has to attest."""

    ref: Any
    version: int
    digest: str
    nbytes: int


class Samplers(Protocol):
    def sample(self, split: str, problems: Array, n: int, params: SamplingParams) -> Made:
        """(P,) problem ids -> Rollouts, n completions each, under the version that is loaded."""

    def load(self, update: Published) -> Facts:
        """Serve the update's version from now on; every sampler attests it, or this raises WeightSyncError."""


class Graders(Protocol):
    def grade(self, split: str, rollouts: Made) -> Made:
        """Rollouts -> (R,) rewards."""


class Advantages(Protocol):
    def centre(self, rollouts: Made, rewards: Made, reference: Made | None) -> Centred:
        """Rollouts and rewards (and log-probabilities of the reference, if a KL penalty is asked for) -> datums."""


class Learner(Protocol):
    def reference(self, rollouts: Made) -> Made:
        """(T,) log-probabilities of the completions' tokens under the base."""

    def step(self, datums: Made, step: int) -> Facts:
        """forward_backward and optim_step."""

    def publish(self) -> Published:
        """The adapter as it is now, as a WeightUpdate."""


class Keeper(Protocol):
    done: int  # the step of the last checkpoint; -1: not even the evaluation before the first step has one

    def save(self, step: int, ledger: Ledger) -> None:
        """The last act of a step: what an interrupted run goes on from. May go on being written while others work."""


class Observer(Protocol):
    def on_rewind(self, step: int) -> None: ...
    def on_step(self, step: int, facts: Facts, rollouts: Made, rewards: Made) -> None: ...
    def on_eval(self, step: int, facts: Facts, rollouts: Made, rewards: Made) -> None: ...


@dataclass(frozen=True, slots=True)
class Stages:
    samplers: Samplers
    graders: Graders
    advantages: Advantages
    learner: Learner
    keeper: Keeper


class Rewound(Exception):
    """Raised by a stage that lost something and is whole again: the learner stands after `step`, what came later is to
    be done again. None: it stands where it stood, and only the step in hand is lost."""

    def __init__(self, step: int | None) -> None:
        super().__init__(step)
        self.step = step
