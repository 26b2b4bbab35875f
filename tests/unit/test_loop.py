"""The loop against small stages that really compute something, and lose it now and then."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys import loop
from rlsys.config import JobConfig, parse_config
from rlsys.ledger import TRAINED, Ledger
from rlsys.problems import Epochs
from rlsys.stages import Centred, Facts, Made, Published, Rewound, Stages
from rlsys.types import Array, SamplingParams

STEPS, BATCH = 6, 3


def job(every_steps: int = 1) -> JobConfig:
    text = f"""
    run: {{name: toy, seed: 4}}
    model: {{path: x}}
    checkpoint: {{every_steps: {every_steps}}}
    rl: {{steps: {STEPS}, problems_per_step: {BATCH}}}
    eval: {{every_steps: 2}}
    """
    return parse_config(text)


def ledger() -> Ledger:
    return Ledger(Epochs(num_problems=7, batch=BATCH, seed=4))


@dataclass
class World:
    """A learner whose state is a hash over everything it was ever trained on, and stages that fail by a plan.

    `plan`: what the n-th call of any stage loses: nothing, the work in hand, or the learner.
    """

    config: JobConfig
    plan: list[str]
    state: str = "base"
    version: int = 0
    done: int = -1
    saved: tuple[str, int, bytes] = ("base", 0, b"")
    loaded: tuple[int, str] = (-1, "")
    lines: list[tuple[str, int]] = field(default_factory=list)

    def loses(self, may_lose_data: bool = True) -> None:
        what = self.plan.pop(0) if self.plan else ""
        if what == "learner":
            self.state, self.version = self.saved[:2]
            raise Rewound(self.done)
        if what == "data" and may_lose_data:
            raise Rewound(None)

    # samplers
    def sample(self, split: str, problems: Array, n: int, params: SamplingParams) -> Made:
        assert self.loaded == (self.version, self.state), "samplers serve something else than the learner's weights"
        self.loses()
        return Made((split, tuple(problems), params.seed, self.state), {"sampler/completion_tokens_mean": 1.0})

    def load(self, update: Published) -> Facts:
        self.loaded = (update.version, update.digest)
        return {}

    # graders, advantages
    def grade(self, split: str, rollouts: Made) -> Made:
        self.loses()
        return Made(rollouts.ref, {"reward/mean": 0.5})

    def centre(self, rollouts: Made, rewards: Made, reference: Made | None) -> Centred:
        self.loses()
        return Centred(rewards.ref, {}, np.full(BATCH, TRAINED, np.int8))

    # learner
    def reference(self, rollouts: Made) -> Made:
        raise AssertionError("there is no KL penalty")

    def step(self, datums: Made, step: int) -> Facts:
        self.loses()
        self.state = hashlib.sha1(f"{self.state}{datums.ref}{step}".encode()).hexdigest()
        self.version += 1
        return {}

    def publish(self) -> Published:
        self.loses(may_lose_data=False)
        return Published(None, self.version, self.state, 0)

    # keeper
    def save(self, step: int, ledger: Ledger) -> None:
        self.loses(may_lose_data=False)
        self.saved, self.done = (self.state, self.version, ledger.to_bytes()), step

    # observer
    def on_rewind(self, step: int) -> None:
        self.lines = [line for line in self.lines if line[1] <= step]

    def on_step(self, step: int, facts: Facts, rollouts: Made, rewards: Made) -> None:
        self.lines.append(("step", step))

    def on_eval(self, step: int, facts: Facts, rollouts: Made, rewards: Made) -> None:
        self.lines.append(("eval", step))

    def run(self, book: Ledger, stop_after: int = STEPS) -> int:
        stages = Stages(self, self, self, self, self)
        return loop.run(self.config, stages, book, np.arange(2), self, lambda: self.version >= stop_after)


@pytest.fixture(scope="module")
def undisturbed() -> World:
    world = World(job(), [])
    assert world.run(ledger()) == STEPS
    return world


PLANS = st.lists(st.sampled_from(["", "", "", "data", "learner"]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(plan=PLANS, every_steps=st.integers(1, 4))
def test_whatever_is_lost_the_run_ends_as_if_nothing_had_been(
    undisturbed: World, plan: list[str], every_steps: int
) -> None:
    book, world = ledger(), World(job(every_steps), list(plan))
    assert world.run(book) == STEPS
    assert world.state == undisturbed.state
    assert world.lines == undisturbed.lines
    book.audit()
    assert book.counts()["trained"] == STEPS * BATCH
    assert world.done == STEPS


@settings(max_examples=100, deadline=None)
@given(stop_after=st.integers(1, STEPS), every_steps=st.integers(1, 4), plan=PLANS)
def test_a_run_that_is_stopped_and_gone_on_with_equals_one_that_never_was(
    undisturbed: World, stop_after: int, every_steps: int, plan: list[str]
) -> None:
    first = World(job(every_steps), list(plan))
    done = first.run(ledger(), stop_after)
    assert done == first.done >= stop_after
    state, version, content = first.saved
    second = World(job(every_steps), [], state, version, first.done, first.saved, lines=first.lines)
    second.run(Ledger.from_bytes(content, Epochs(num_problems=7, batch=BATCH, seed=4)))
    assert second.state == undisturbed.state
    assert second.lines == undisturbed.lines


def test_without_a_step_to_make_the_base_is_evaluated_and_saved_once() -> None:
    world = World(parse_config("run: {name: toy}\nmodel: {path: x}\nrl: {steps: 0}"), [])
    assert world.run(ledger()) == 0
    assert world.lines == [("eval", 0)] and world.done == 0
