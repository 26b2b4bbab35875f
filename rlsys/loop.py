"""The whole loop: problems -> samplers -> rewards -> advantages -> learner -> adapter -> samplers.

Each verb below is a stage. What a stage hands to the next is a reference to columnar data that stays where it was made;
what it tells the loop is `facts`, a few numbers. The stages are given as Protocols: their in-cluster implementations
live in `actors/`, and nothing here knows Ray, vLLM or PEFT.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.config import JobConfig
from rlsys.problems import Epochs
from rlsys.types import Array, SamplingParams

Facts = Mapping[str, float]  # names are listed in docs/metrics.md


@dataclass(frozen=True, slots=True)
class Made:
    """What a stage made: a reference to the data, which the loop only passes on, and a few facts about it."""

    ref: Any
    facts: Facts


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
    def centre(self, rollouts: Made, rewards: Made, reference: Made | None) -> Made:
        """Rollouts and rewards (and log-probabilities of the reference, if a KL penalty is asked for) -> datums."""


class Learner(Protocol):
    def reference(self, rollouts: Made) -> Made:
        """(T,) log-probabilities of the completions' tokens under the base."""

    def step(self, datums: Made, step: int) -> Facts:
        """forward_backward and optim_step."""

    def publish(self) -> Published:
        """The adapter as it is now, as a WeightUpdate."""


class Observer(Protocol):
    def on_step(self, step: int, facts: Facts, rollouts: Made, rewards: Made) -> None: ...
    def on_eval(self, step: int, facts: Facts, rollouts: Made, rewards: Made) -> None: ...


@dataclass(frozen=True, slots=True)
class Stages:
    samplers: Samplers
    graders: Graders
    advantages: Advantages
    learner: Learner


def run(
    config: JobConfig,
    stages: Stages,
    epochs: Epochs,
    held_out: Array,
    observer: Observer,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train for ``rl.steps`` steps, or until ``should_stop``; returns the steps that were made, each of them whole."""
    samplers, learner = stages.samplers, stages.learner
    samplers.load(learner.publish())
    evaluate(config, stages, held_out, 0, observer)
    done = 0
    for step in range(1, config.rl.steps + 1):
        if should_stop():
            break
        clock = Clock()
        with clock("sample"):
            problems = epochs.batch_at(step - 1)
            params = config.rl.sampling.params(seed=config.run.seed * 1_000_003 + step)
            rollouts = samplers.sample("train", problems, config.rl.samples_per_problem, params)
        with clock("grade"):
            rewards = stages.graders.grade("train", rollouts)
        with clock("reference"):
            reference = learner.reference(rollouts) if config.rl.advantages.kl_coef > 0 else None
        with clock("advantage"):
            datums = stages.advantages.centre(rollouts, rewards, reference)
        with clock("learn"):
            learned = learner.step(datums, step)
        with clock("sync"):
            synced = samplers.load(learner.publish())
        facts = {**rollouts.facts, **rewards.facts, **datums.facts, **learned, **synced, **clock.facts()}
        observer.on_step(step, facts, rollouts, rewards)
        done = step
        if step == config.rl.steps or (config.eval.every_steps and step % config.eval.every_steps == 0):
            evaluate(config, stages, held_out, step, observer)
    return done


def evaluate(config: JobConfig, stages: Stages, held_out: Array, step: int, observer: Observer) -> None:
    """Greedy accuracy on the held-out problems; nothing here is trained on."""
    clock = Clock()
    with clock("eval"):
        params = SamplingParams(max_tokens=config.eval.max_tokens, temperature=0.0, stop=config.rl.sampling.stop)
        rollouts = stages.samplers.sample("eval", held_out, 1, params)
        rewards = stages.graders.grade("eval", rollouts)
    facts = {
        "eval/accuracy": rewards.facts["reward/mean"],
        "eval/mean_tokens": rollouts.facts["sampler/completion_tokens_mean"],
        "time/eval_s": clock.seconds["eval"],
    }
    observer.on_eval(step, facts, rollouts, rewards)


class Clock:
    """Seconds by stage of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def facts(self) -> Facts:
        return {f"time/{stage}_s": s for stage, s in self.seconds.items()} | {"time/step_s": sum(self.seconds.values())}
