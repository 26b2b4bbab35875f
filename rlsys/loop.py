"""The whole loop: problems -> samplers -> rewards -> advantages -> learner -> adapter -> samplers.

Each verb below is a stage (`rlsys.protocols`); nothing here knows Ray, vLLM or PEFT. A step is a function of the
learner's state, the problems drawn and the seed, so one that is lost is simply done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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

    def over() -> bool:
        return done >= 0 and (done >= config.rl.steps or should_stop())

    while not over() or done != stages.checkpointer.done:
        try:
            if over():
                stages.checkpointer.save(done, ledger, stages.learner.state())
                continue
            if not loaded:
                stages.samplers.load(stages.learner.publish())
                loaded = True
            if done < 0:
                evaluate(config, stages, held_out, 0, observer)
            else:
                train(config, stages, ledger, held_out, observer, done + 1)
            done += 1
            if done % config.checkpoint.every_steps == 0:
                stages.checkpointer.save(done, ledger, stages.learner.state())
        except RolledBack as back:
            done, loaded = (done, loaded) if back.step is None else (back.step, False)
            ledger.roll_back(max(done, 0))
            observer.on_rollback(done)
    return done


def train(config: JobConfig, stages: Stages, ledger: Ledger, held_out: Array, observer: Observer, step: int) -> None:
    """One step, from problems to an adapter that every sampler serves."""
    learner, clock, version = stages.learner, Clock(), stages.samplers.version
    problems, rollouts, rewards = sample_groups(config.rl, config.run.seed, stages, ledger, step, clock)
    with clock("reference"):
        reference = learner.reference(rollouts) if config.rl.advantages.kl_coef > 0 else None
    with clock("advantage"):
        datums = stages.advantages.compute_advantages(rollouts, rewards, reference, config.rl.substeps)
    with clock("learn"):
        learned = learn(stages, datums, step)
        ledger.settle(step, datums.outcomes)
    with clock("sync"):
        synced = stages.samplers.load(learner.publish())
    speed = {"sampler/tokens_per_s": rollouts.metrics["sampler/completion_tokens"] / clock.seconds["sample"]}
    updated = reduce_metrics([minibatch.metrics for minibatch in learned])
    metrics = {**rollouts.metrics, **speed, **rewards.metrics, **datums.metrics, **updated, **synced, **clock.metrics()}
    observer.on_step(step, metrics, TrainedStep(version, problems, rollouts, rewards, reference, [datums], learned))
    if is_eval_step(config.eval, step, config.rl.steps):
        evaluate(config, stages, held_out, step, observer)


def sample_groups(
    rl: RlSection, seed: int, stages: Stages, ledger: Ledger, step: int, clock: Clock
) -> tuple[Array, RolloutsRef, RewardsRef]:
    """A batch of groups with their rewards; up to ``rl.refill_rounds`` rounds more replace those that teach nothing."""
    problems, rollouts, rewards = list[Array](), list[RolloutsRef](), list[RewardsRef]()
    wanted, nothing = rl.problems_per_step, np.empty(0, np.int64)
    while wanted and len(rollouts) <= rl.refill_rounds:
        with clock("sample"):
            before, drawn = np.concatenate([nothing, *problems]), ledger.draw(step, wanted)
            problems.append(drawn)
            count, params = rl.samples_per_problem, training_params(rl.sampling, seed, step)
            rollouts.append(stages.samplers.sample("train", drawn, count, params, occurrences(drawn, before)))
        with clock("grade"):
            rewards.append(stages.graders.grade("train", rollouts[-1]))
        wanted = int(rewards[-1].idle.sum())
    return (
        np.concatenate(problems),
        with_refill_metrics(rl, rollouts, len(rollouts) - 1),
        concatenate_rewards(rewards),
    )


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


def evaluate(config: JobConfig, stages: Stages, held_out: Array, step: int, observer: Observer) -> None:
    """On the held-out problems; nothing here is trained on, so what is lost is only repeated."""
    while True:
        try:
            found = evaluate_policy(config, stages.samplers, stages.graders, held_out)
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
