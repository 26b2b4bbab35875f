"""The overlapped loop: samplers go on while the learner learns, no further ahead than ``overlap.max_policy_lag`` steps.

    lag 1    samplers    | groups of step 1 | of step 2 | of step 3 | ...
             learner                        |  learns 1 |  learns 2 | ...

Nothing is drained and nothing that is finished is thrown away: what bounds the lag is admission. Groups of step s are
drawn once the samplers serve the weights of step s - 1 - lag, and each starts on the newest weights there are. With lag
0 that is the loop of `rlsys.loop`.

Three things happen at once. This thread tends the samplers; one thread grades and centres, one learns, each taking
pieces in the order of the steps. A piece is a share of a step's groups; the learner starts on it when its own groups
are there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from rlsys.config import JobConfig
from rlsys.data.problems import occurrences
from rlsys.loop import evaluate, is_eval_step, training_params, with_refill_metrics
from rlsys.metrics import Metrics, reduce_metrics
from rlsys.protocols import (
    DatumsRef,
    LogprobsRef,
    MinibatchPosition,
    Observer,
    PublishedAdapter,
    RewardsRef,
    RolledBack,
    RolloutsRef,
    Stages,
    TrainedStep,
    concatenate_logprobs,
    concatenate_rewards,
    concatenate_rollouts,
)
from rlsys.run_state.ledger import Ledger
from rlsys.types import Array

POLL_S = 0.01  # how late this thread may hear of a thread that is done


def run(
    config: JobConfig,
    stages: Stages,
    ledger: Ledger,
    held_out: Array,
    observer: Observer,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """As ``rlsys.loop.run``."""
    done = stages.checkpointer.done
    while True:
        pipeline = Pipeline(config, stages, ledger, observer, held_out, should_stop, done)
        try:
            return pipeline.run()
        except RolledBack as back:
            done = pipeline.recover(back)
            ledger.roll_back(max(done, 0))
            observer.on_rollback(done)
        finally:
            pipeline.close(wait=False)


@dataclass(eq=False)
class Minibatch:
    """A share of a step's groups on its way."""

    position: MinibatchPosition
    problems: list[Array] = field(default_factory=list)
    rollouts: list[RolloutsRef] = field(default_factory=list)  # one of each round of sampling
    rewards: list[RewardsRef] = field(default_factory=list)
    graded_s: float = 0.0
    grading: Future[tuple[RewardsRef, float]] | None = None
    learning: Future[LearnedMinibatch] | None = None


@dataclass(frozen=True, slots=True)
class LearnedMinibatch:
    """What the learner's thread made of a piece, and of the step, if it was the step's last."""

    version: int  # of the learner when the step began
    reference: LogprobsRef | None
    datums: DatumsRef
    update: LogprobsRef
    published: PublishedAdapter | None
    state: object
    seconds: Metrics


class Pipeline:
    """The loop between two losses: begins with a learner that stands after step `done` and nothing in flight."""

    def __init__(
        self,
        config: JobConfig,
        stages: Stages,
        ledger: Ledger,
        observer: Observer,
        held_out: Array,
        should_stop: Callable[[], bool],
        done: int,
    ) -> None:
        assert config.overlap.max_policy_lag is not None
        self.config, self.stages, self.ledger = config, stages, ledger
        self.observer, self.held_out, self.should_stop = observer, held_out, should_stop
        self.lag = config.overlap.max_policy_lag
        self.done = done  # learned, served by the samplers, settled
        self.drawn = max(done, 0)
        self.stopping = False
        self.steps: dict[int, list[Minibatch]] = {}
        self.tickets: dict[int, Minibatch] = {}
        self.queue: deque[Minibatch] = deque()  # in the order in which the learner takes them
        self.version = 0  # of the learner when it began its step; only its thread asks
        self.failed: BaseException | None = None  # what the learner's thread stopped at
        self.ready_at = self.step_at = time.perf_counter()
        self.grading = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self.learning = ThreadPoolExecutor(1, thread_name_prefix="learning")

    # the loop

    def run(self) -> int:
        published = self.stages.learner.publish()
        self.stages.samplers.load(published)
        self.version = published.version
        self.step_at = self.ready_at = time.perf_counter()  # the first step is sampled beside its evaluation
        if self.done < 0:
            self.done, lost = 0, list[RolledBack]()

            def admit() -> None:  # the first steps sample with the weights that are evaluated
                try:
                    self._admit()
                except RolledBack as back:
                    if back.step is not None:
                        raise
                    lost.append(back)  # heard once the evaluation has been told

            evaluate(self.config, self.stages, self.held_out, 0, self.observer, admit)
            self._save(self.stages.learner.state())
            if lost:
                raise lost[0]
        while self.done < self.config.rl.steps and not (self.stopping and not self._is_learning()):
            self.stopping = self.stopping or self.should_stop()
            self._admit()
            for ticket, rollouts in self.stages.samplers.collect(POLL_S):
                self._grade(self.tickets.pop(ticket), rollouts)
            self._collect_grades()
            self._collect_steps()
        self.stages.samplers.forget()
        if self.done != self.stages.checkpointer.done:
            self._save(self.stages.learner.state())
        return self.done

    def _admit(self) -> None:
        """Draw for every step that may start now: its groups will be at most `lag` steps old when they are learned."""
        while self.drawn < min(self.done + 1 + self.lag, self.config.rl.steps) and not self.stopping:
            self.drawn += 1
            problems = self.ledger.draw(self.drawn, self.config.rl.problems_per_step)
            substeps, each = self.config.rl.substeps, self.config.overlap.minibatches
            minibatches = [
                Minibatch(MinibatchPosition(self.drawn, i // each, i % each == 0, (i + 1) % each == 0, False))
                for i in range(substeps * each)
            ]
            self.steps[self.drawn] = minibatches
            self.queue.extend(minibatches)
            for minibatch, share in zip(minibatches, np.array_split(problems, len(minibatches)), strict=True):
                self._submit(minibatch, share)

    def _submit(self, minibatch: Minibatch, problems: Array) -> None:
        step, samplers = minibatch.position.step, self.stages.samplers
        before = [part for other in self.steps[step] for part in other.problems]
        minibatch.problems.append(problems)
        nth = occurrences(problems, np.concatenate(before) if before else ())
        rl = self.config.rl
        count, params = rl.samples_per_problem, training_params(rl.sampling, self.config.run.seed, step)
        self.tickets[samplers.submit("train", problems, count, params, nth)] = minibatch

    def _grade(self, minibatch: Minibatch, rollouts: RolloutsRef) -> None:
        minibatch.rollouts.append(rollouts)
        minibatch.grading = self.grading.submit(self._graded, rollouts)

    def _graded(self, rollouts: RolloutsRef) -> tuple[RewardsRef, float]:
        began = time.perf_counter()
        return self.stages.graders.grade("train", rollouts), time.perf_counter() - began

    def _collect_grades(self) -> None:
        """Replace groups that teach nothing, if asked to; hand whole pieces to the learner, in order."""
        for minibatch in list(self.queue):
            if minibatch.grading is not None and minibatch.grading.done():
                rewards, seconds = minibatch.grading.result()
                minibatch.rewards.append(rewards)
                minibatch.graded_s += seconds
                minibatch.grading = None
                idle = int(minibatch.rewards[-1].idle.sum())
                if idle and len(minibatch.rewards) <= self.config.rl.refill_rounds:
                    self._submit(minibatch, self.ledger.draw(minibatch.position.step, idle))
        while self.queue and self._is_graded(self.queue[0]):
            if self.stopping and self.queue[0].position.begins_step:
                return
            minibatch = self.queue.popleft()
            minibatch.learning = self.learning.submit(self._learn, minibatch)

    def _is_graded(self, minibatch: Minibatch) -> bool:
        return bool(minibatch.problems) and len(minibatch.rewards) == len(minibatch.problems)

    def _is_learning(self) -> bool:
        """Whether the step after the last one has begun to change the learner."""
        return any(minibatch.learning is not None for minibatch in self.steps.get(self.done + 1, ()))

    def _collect_steps(self) -> None:
        while minibatches := self.steps.get(self.done + 1):
            for minibatch in minibatches:
                if minibatch.learning is not None and minibatch.learning.done():
                    minibatch.learning.result()  # raises what it raised
            if not self._is_made(self.done + 1):
                return
            self._finish(self.done + 1)

    def _finish(self, step: int) -> None:
        """The learner has made a step: have its weights served, then write down what it was."""
        minibatches = self.steps[step]
        learned = [minibatch.learning.result() for minibatch in minibatches if minibatch.learning is not None]
        last = learned[-1]
        assert last.published is not None
        start = time.perf_counter()
        synced = self.stages.samplers.load(last.published)
        now = time.perf_counter()
        parts = [part for minibatch in minibatches for part in minibatch.rollouts]
        rollouts = with_refill_metrics(self.config.rl, parts, len(parts) - len(minibatches))
        rewards = concatenate_rewards([part for minibatch in minibatches for part in minibatch.rewards])
        reference = concatenate_logprobs([one.reference for one in learned if one.reference is not None])
        outcomes = np.concatenate([one.datums.outcomes for one in learned])
        self.ledger.settle(step, outcomes)
        del self.steps[step]
        self.done = step
        lost = None
        try:
            self._admit()  # before anything else takes its time
        except RolledBack as back:
            lost = back  # heard once this step has been told
        seconds, self.step_at = now - self.step_at, now
        metrics = {
            **rollouts.metrics,
            **rewards.metrics,
            **reduce_metrics([one.datums.metrics for one in learned]),
            **reduce_metrics([one.update.metrics for one in learned]),
            **synced,
            **{name: sum(one.seconds[name] for one in learned) for name in last.seconds},
            "sampler/tokens_per_s": rollouts.metrics["sampler/completion_tokens"] / seconds,
            "time/grade_s": sum(minibatch.graded_s for minibatch in minibatches),
            "time/sync_s": now - start,
            "time/step_s": seconds,
        }
        problems = np.concatenate([part for minibatch in minibatches for part in minibatch.problems])
        datums, updates = [one.datums for one in learned], [one.update for one in learned]
        base = reference if reference.refs else None
        trained = TrainedStep(learned[0].version, problems, rollouts, rewards, base, datums, updates)
        self.observer.on_step(step, metrics, trained)
        if is_eval_step(self.config.eval, step, self.config.rl.steps):
            evaluate(self.config, self.stages, self.held_out, step, self.observer)
        if step % self.config.checkpoint.every_steps == 0:
            self._save(last.state)
        if lost is not None:
            raise lost

    def _save(self, state: object) -> None:
        self.stages.checkpointer.save(self.done, self.ledger, state)

    # in the learner's thread

    def _learn(self, minibatch: Minibatch) -> LearnedMinibatch:
        """In order, and none after one that failed: a learner that went back must not go on with what came later."""
        if self.failed is not None:
            raise self.failed
        try:
            return self._learned(minibatch)
        except BaseException as error:
            self.failed = error
            raise

    def _learned(self, minibatch: Minibatch) -> LearnedMinibatch:
        began = time.perf_counter()
        waited = began - self.ready_at
        learner, position = self.stages.learner, minibatch.position
        rollouts, rewards = concatenate_rollouts(minibatch.rollouts), concatenate_rewards(minibatch.rewards)
        reference = learner.reference(rollouts) if self.config.rl.advantages.kl_coef > 0 else None
        referred = time.perf_counter()
        datums = self.stages.advantages.compute_advantages(rollouts, rewards, reference, 1)
        computed = time.perf_counter()
        lag_max = max(0.0, self.version - datums.metrics.get("sampler/version_min", self.version))
        lag_mean = max(0.0, self.version - datums.metrics.get("sampler/version_mean", self.version))
        on_policy, version = position.substep == 0 and lag_max == 0, self.version
        update = learner.learn(
            datums.batches[0],
            MinibatchPosition(position.step, position.substep, position.first, position.last, on_policy),
        )
        published, state = None, None
        if position.last and position.substep == self.config.rl.substeps - 1:
            published = learner.publish()
            self.version = published.version
            state = learner.state() if position.step % self.config.checkpoint.every_steps == 0 else None
        lags = {"policy/lag_mean": lag_mean, "policy/lag_max": lag_max}
        self.ready_at = time.perf_counter()
        seconds = {
            "time/waiting_s": waited,
            "time/reference_s": referred - began,
            "time/advantage_s": computed - referred,
            "time/learn_s": self.ready_at - computed,
        }
        return LearnedMinibatch(
            version, reference, datums, LogprobsRef(update.refs, {**update.metrics, **lags}), published, state, seconds
        )

    # losses

    def recover(self, back: RolledBack) -> int:
        """Let the threads come to rest, forget what was in flight. Returns the step after which the learner stands."""
        self.stopping = True
        self.stages.samplers.forget()
        self.close(wait=True)
        if isinstance(self.failed, RolledBack) and self.failed.step is not None:
            return self.failed.step  # nothing has touched the learner since
        while True:
            try:
                while back.step is None and self._is_made(self.done + 1):
                    self._finish(self.done + 1)
                if any(minibatch.learning and not minibatch.learning.cancelled() for minibatch in self._ahead()):
                    self.stages.learner.restore()  # it may have gone on meanwhile, or is in the middle of a step
                return self.done if back.step is None else back.step
            except RolledBack as again:
                self.stages.samplers.forget()
                if again.step is not None:
                    return again.step

    def _is_made(self, step: int) -> bool:
        made = [minibatch.learning for minibatch in self.steps.get(step, ())]
        return bool(made) and all(
            one is not None and one.done() and not one.cancelled() and one.exception() is None for one in made
        )

    def _ahead(self) -> list[Minibatch]:
        return [minibatch for minibatches in self.steps.values() for minibatch in minibatches]

    def close(self, wait: bool) -> None:
        for thread in (self.grading, self.learning):
            thread.shutdown(wait=wait, cancel_futures=True)
