"""The whole loop: problems -> samplers -> rewards -> advantages -> learner -> adapter -> samplers.

Each verb below is a stage (`rlsys.protocols`); nothing here knows Ray, vLLM or PEFT. A step is a function of the
learner's state, the problems drawn and the seed, so one that is lost is simply done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from rlsys.config import EvalSection, JobConfig, RlSection, SamplingSection
from rlsys.data.problems import occurrences
from rlsys.evaluation.evaluate import evaluate_policy
from rlsys.metrics import Metrics, reduce_metrics
from rlsys.protocols import (
    DatumsRef,
    LogprobsRef,
    MinibatchPosition,
    Observer,
    RewardsRef,
    RolledBack,
    RolloutsRef,
    Samplers,
    Stages,
    TrainedStep,
    concatenate_rewards,
    concatenate_rollouts,
)
from rlsys.run_state.ledger import Ledger
from rlsys.types import Array, SamplingParams


def run(
    config: JobConfig,
    stages: Stages,
    ledger: Ledger,
    held_out: Array,
    observer: Observer,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """From the last checkpoint to ``rl.steps``, or until ``should_stop``. Returns the last step; each is whole."""
    done, loaded = stages.checkpointer.done, False
    ahead: RequestedGroups | None = None

    def over() -> bool:
        return done >= 0 and (done >= config.rl.steps or should_stop())

    def sample_ahead(step: int) -> None:
        """The next step samples with the weights that are evaluated, so it begins meanwhile."""
        nonlocal ahead
        if ahead is not None or step >= config.rl.steps or should_stop():
            return
        try:
            ahead = request_groups(config, stages.samplers, ledger, step + 1, config.rl.problems_per_step)
        except RolledBack as back:
            if back.step is not None:
                raise
            ledger.roll_back(step)

    while not over() or done != stages.checkpointer.done:
        try:
            if over():
                stages.checkpointer.save(done, ledger, stages.learner.state())
                continue
            if not loaded:
                stages.samplers.load(stages.learner.publish())
                loaded = True
            if done >= 0:
                train(config, stages, ledger, observer, done + 1, ahead)
                ahead = None
            if done < 0 or is_eval_step(config.eval, done + 1, config.rl.steps):
                evaluate(config, stages, held_out, done + 1, observer, partial(sample_ahead, done + 1))
            done += 1
            if done % config.checkpoint.every_steps == 0:
                stages.checkpointer.save(done, ledger, stages.learner.state())
        except RolledBack as back:
            done, loaded = (done, loaded) if back.step is None else (back.step, False)
            stages.samplers.forget()
            ahead = None
            ledger.roll_back(max(done, 0))
            observer.on_rollback(done)
    stages.samplers.forget()
    return done


@dataclass(frozen=True, slots=True)
class RequestedGroups:
    """Groups of a step that the samplers were asked for."""

    problems: Array  # (P,) ids
    ticket: int
    since: float  # time.perf_counter()


def train(
    config: JobConfig, stages: Stages, ledger: Ledger, observer: Observer, step: int, ahead: RequestedGroups | None
) -> None:
    """One step, from problems to an adapter that every sampler serves. `ahead`: its first groups, if they are being
    sampled."""
    learner, clock, version = stages.learner, Clock(), stages.samplers.version
    groups = sample_groups(config, stages, ledger, step, ahead, clock)
    rollouts, rewards = groups.rollouts, groups.rewards
    with clock("reference"):
        reference = learner.reference(rollouts) if config.rl.advantages.kl_coef > 0 else None
    with clock("advantage"):
        datums = stages.advantages.compute_advantages(rollouts, rewards, reference, config.rl.substeps)
    with clock("learn"):
        learned = learn(stages, datums, step)
        ledger.settle(step, datums.outcomes)
    with clock("sync"):
        synced = stages.samplers.load(learner.publish())
    speed = {"sampler/tokens_per_s": rollouts.metrics["sampler/completion_tokens"] / groups.sampling_s}
    updated = reduce_metrics([minibatch.metrics for minibatch in learned])
    metrics = {**rollouts.metrics, **speed, **rewards.metrics, **datums.metrics, **updated, **synced, **clock.metrics()}
    trained = TrainedStep(version, groups.problems, rollouts, rewards, reference, [datums], learned)
    observer.on_step(step, metrics, trained)


@dataclass(frozen=True, slots=True)
class GradedGroups:
    """A step's batch. `sampling_s`: from the request for the groups until they were taken, of all rounds."""

    problems: Array  # (P,) ids
    rollouts: RolloutsRef
    rewards: RewardsRef
    sampling_s: float


def sample_groups(
    config: JobConfig, stages: Stages, ledger: Ledger, step: int, ahead: RequestedGroups | None, clock: Clock
) -> GradedGroups:
    """A batch of groups with their rewards; up to ``rl.refill_rounds`` rounds more replace those that teach nothing."""
    problems, rollouts, rewards = list[Array](), list[RolloutsRef](), list[RewardsRef]()
    wanted, sampling_s = config.rl.problems_per_step, 0.0
    while wanted and len(rollouts) <= config.rl.refill_rounds:
        with clock("sample"):
            asked = ahead or request_groups(config, stages.samplers, ledger, step, wanted, problems)
            ahead = None
            rollouts.append(stages.samplers.wait(asked.ticket))
            problems.append(asked.problems)
            sampling_s += time.perf_counter() - asked.since
        with clock("grade"):
            rewards.append(stages.graders.grade("train", rollouts[-1]))
        wanted = int(rewards[-1].idle.sum())
    return GradedGroups(
        np.concatenate(problems),
        with_refill_metrics(config.rl, rollouts, len(rollouts) - 1),
        concatenate_rewards(rewards),
        sampling_s,
    )


def request_groups(
    config: JobConfig, samplers: Samplers, ledger: Ledger, step: int, count: int, before: Sequence[Array] = ()
) -> RequestedGroups:
    """Draw problems of a step and ask for their groups. `before`: problems that the step has drawn already."""
    rl, since = config.rl, time.perf_counter()
    drawn = ledger.draw(step, count)
    nth = occurrences(drawn, np.concatenate([np.empty(0, np.int64), *before]))
    params = training_params(rl.sampling, config.run.seed, step)
    return RequestedGroups(drawn, samplers.submit("train", drawn, rl.samples_per_problem, params, nth), since)


def with_refill_metrics(rl: RlSection, parts: Sequence[RolloutsRef], refills: int) -> RolloutsRef:
    """A batch's rollouts, saying how many rounds of refilling there were, where there may be any."""
    batch = concatenate_rollouts(parts)
    if not rl.refill_rounds:
        return batch
    return RolloutsRef(batch.refs, {**batch.metrics, "sampler/refill_rounds": refills})


def learn(stages: Stages, datums: DatumsRef, step: int) -> list[LogprobsRef]:
    """An optimizer step of each piece; what is lost after the first takes the learner back, as it is half way."""
    learned = list[LogprobsRef]()
    for k, minibatch in enumerate(datums.batches):
        try:
            learned.append(
                stages.learner.learn(minibatch, MinibatchPosition(step, k, first=True, last=True, on_policy=k == 0))
            )
        except RolledBack as back:
            if back.step is None and k > 0:
                stages.learner.restore()
            raise
    return learned


def training_params(sampling: SamplingSection, seed: int, step: int) -> SamplingParams:
    """Seeded by step; the samplers go on from there by problem and by how often the step has drawn it."""
    return sampling.params(seed=seed * 1_000_003 + step)


def is_eval_step(section: EvalSection, step: int, last_step: int) -> bool:
    every = section.every_steps
    return step == last_step or bool(every and step % every == 0)


def evaluate(
    config: JobConfig,
    stages: Stages,
    held_out: Array,
    step: int,
    observer: Observer,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """On the held-out problems; nothing here is trained on, so what is lost is only repeated. `meanwhile`: called once
    the samplers have the problems."""
    while True:
        try:
            found = evaluate_policy(config, stages.samplers, stages.graders, held_out, meanwhile)
            break
        except RolledBack as back:
            if back.step is not None:
                raise
    observer.on_eval(step, found.metrics, found.rollouts, found.grades)


class Clock:
    """Seconds by stage of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self) -> Metrics:
        return {f"time/{stage}_s": s for stage, s in self.seconds.items()} | {"time/step_s": sum(self.seconds.values())}
