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
from rlsys.facts import Facts, combine
from rlsys.ledger import Ledger
from rlsys.loop import evaluate, in_rounds, is_evaluated, training_params
from rlsys.problems import occurrences
from rlsys.stages import (
    Centred,
    Graded,
    Made,
    Observer,
    Place,
    Published,
    Rewound,
    Stages,
    Trained,
    joined,
    joined_grades,
)
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
    done = stages.keeper.done
    while True:
        pipeline = Pipeline(config, stages, ledger, observer, held_out, should_stop, done)
        try:
            return pipeline.run()
        except Rewound as back:
            done = pipeline.settle_down(back)
            ledger.rewind(max(done, 0))
            observer.on_rewind(done)
        finally:
            pipeline.close(wait=False)


@dataclass(eq=False)
class Piece:
    """A share of a step's groups on its way."""

    place: Place
    problems: list[Array] = field(default_factory=list)
    rollouts: list[Made] = field(default_factory=list)  # one of each round of sampling
    rewards: list[Graded] = field(default_factory=list)
    graded_s: float = 0.0
    grading: Future[tuple[Graded, float]] | None = None
    learning: Future[Learned] | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """What the learner's thread made of a piece, and of the step, if it was the step's last."""

    version: int  # of the learner when the step began
    reference: Made | None
    datums: Centred
    update: Made
    published: Published | None
    state: object
    seconds: Facts


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
        self.steps: dict[int, list[Piece]] = {}
        self.tickets: dict[int, Piece] = {}
        self.queue: deque[Piece] = deque()  # in the order in which the learner takes them
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
        if self.done < 0:
            evaluate(self.config, self.stages, self.held_out, 0, self.observer)
            self.done = 0
            self._save(self.stages.learner.state())
        self.step_at = self.ready_at = time.perf_counter()
        while self.done < self.config.rl.steps and not (self.stopping and not self._is_learning()):
            self.stopping = self.stopping or self.should_stop()
            self._admit()
            for ticket, rollouts in self.stages.samplers.collect(POLL_S):
                self._grade(self.tickets.pop(ticket), rollouts)
            self._take_in_grades()
            self._take_in_steps()
        self.stages.samplers.forget()
        if self.done != self.stages.keeper.done:
            self._save(self.stages.learner.state())
        return self.done

    def _admit(self) -> None:
        """Draw for every step that may start now: its groups will be at most `lag` steps old when they are learned."""
        while self.drawn < min(self.done + 1 + self.lag, self.config.rl.steps) and not self.stopping:
            self.drawn += 1
            problems = self.ledger.draw(self.drawn, self.config.rl.problems_per_step)
            substeps, minibatches = self.config.rl.substeps, self.config.overlap.minibatches
            pieces = [
                Piece(Place(self.drawn, i // minibatches, i % minibatches == 0, (i + 1) % minibatches == 0, False))
                for i in range(substeps * minibatches)
            ]
            self.steps[self.drawn] = pieces
            self.queue.extend(pieces)
            for piece, share in zip(pieces, np.array_split(problems, len(pieces)), strict=True):
                self._submit(piece, share)

    def _submit(self, piece: Piece, problems: Array) -> None:
        step, samplers = piece.place.step, self.stages.samplers
        before = [part for other in self.steps[step] for part in other.problems]
        piece.problems.append(problems)
        nth = occurrences(problems, np.concatenate(before) if before else ())
        count, params = self.config.rl.samples_per_problem, training_params(self.config, step)
        self.tickets[samplers.submit("train", problems, count, params, nth)] = piece

    def _grade(self, piece: Piece, rollouts: Made) -> None:
        piece.rollouts.append(rollouts)
        piece.grading = self.grading.submit(self._graded, rollouts)

    def _graded(self, rollouts: Made) -> tuple[Graded, float]:
        began = time.perf_counter()
        return self.stages.graders.grade("train", rollouts), time.perf_counter() - began

    def _take_in_grades(self) -> None:
        """Replace groups that teach nothing, if asked to; hand whole pieces to the learner, in order."""
        for piece in list(self.queue):
            if piece.grading is not None and piece.grading.done():
                rewards, seconds = piece.grading.result()
                piece.rewards.append(rewards)
                piece.graded_s += seconds
                piece.grading = None
                idle = int(piece.rewards[-1].idle.sum())
                if idle and len(piece.rewards) <= self.config.rl.refill_rounds:
                    self._submit(piece, self.ledger.draw(piece.place.step, idle))
        while self.queue and self._is_whole(self.queue[0]):
            if self.stopping and self.queue[0].place.begins_step:
                return
            piece = self.queue.popleft()
            piece.learning = self.learning.submit(self._learn, piece)

    def _is_whole(self, piece: Piece) -> bool:
        return bool(piece.problems) and len(piece.rewards) == len(piece.problems)

    def _is_learning(self) -> bool:
        """Whether the step after the last one has begun to change the learner."""
        return any(piece.learning is not None for piece in self.steps.get(self.done + 1, ()))

    def _take_in_steps(self) -> None:
        while pieces := self.steps.get(self.done + 1):
            for piece in pieces:
                if piece.learning is not None and piece.learning.done():
                    piece.learning.result()  # raises what it raised
            if not self._is_made(self.done + 1):
                return
            self._finish(self.done + 1)

    def _finish(self, step: int) -> None:
        """The learner has made a step: have its weights served, then write down what it was."""
        pieces = self.steps[step]
        learned = [piece.learning.result() for piece in pieces if piece.learning is not None]
        last = learned[-1]
        assert last.published is not None
        start = time.perf_counter()
        synced = self.stages.samplers.load(last.published)
        now = time.perf_counter()
        parts = [part for piece in pieces for part in piece.rollouts]
        rollouts = in_rounds(self.config, parts, len(parts) - len(pieces))
        rewards = joined_grades([part for piece in pieces for part in piece.rewards])
        reference = joined([one.reference for one in learned if one.reference is not None])
        outcomes = np.concatenate([one.datums.outcomes for one in learned])
        self.ledger.settle(step, outcomes)
        del self.steps[step]
        self.done = step
        lost = None
        try:
            self._admit()  # before anything else takes its time
        except Rewound as back:
            lost = back  # heard once this step has been told
        seconds, self.step_at = now - self.step_at, now
        facts = {
            **rollouts.facts,
            **rewards.facts,
            **combine([one.datums.facts for one in learned]),
            **combine([one.update.facts for one in learned]),
            **synced,
            **{name: sum(one.seconds[name] for one in learned) for name in last.seconds},
            "sampler/tokens_per_s": rollouts.facts["sampler/completion_tokens"] / seconds,
            "time/grade_s": sum(piece.graded_s for piece in pieces),
            "time/sync_s": now - start,
            "time/step_s": seconds,
        }
        problems = np.concatenate([part for piece in pieces for part in piece.problems])
        datums, updates = [one.datums for one in learned], [one.update for one in learned]
        base = reference if reference.refs else None
        trained = Trained(learned[0].version, problems, rollouts, rewards, base, datums, updates)
        self.observer.on_step(step, facts, trained)
        if is_evaluated(self.config, step):
            evaluate(self.config, self.stages, self.held_out, step, self.observer)
        if step % self.config.checkpoint.every_steps == 0:
            self._save(last.state)
        if lost is not None:
            raise lost

    def _save(self, state: object) -> None:
        self.stages.keeper.save(self.done, self.ledger, state)

    # in the learner's thread

    def _learn(self, piece: Piece) -> Learned:
        """In order, and none after one that failed: a learner that went back must not go on with what came later."""
        if self.failed is not None:
            raise self.failed
        try:
            return self._learned(piece)
        except BaseException as error:
            self.failed = error
            raise

    def _learned(self, piece: Piece) -> Learned:
        began = time.perf_counter()
        waited = began - self.ready_at
        learner, place = self.stages.learner, piece.place
        rollouts, rewards = joined(piece.rollouts), joined_grades(piece.rewards)
        reference = learner.reference(rollouts) if self.config.rl.advantages.kl_coef > 0 else None
        referred = time.perf_counter()
        datums = self.stages.advantages.centre(rollouts, rewards, reference, 1)
        centred = time.perf_counter()
        lag_max = max(0.0, self.version - datums.facts.get("sampler/version_min", self.version))
        lag_mean = max(0.0, self.version - datums.facts.get("sampler/version_mean", self.version))
        on_policy, version = place.substep == 0 and lag_max == 0, self.version
        update = learner.learn(datums.refs[0], Place(place.step, place.substep, place.first, place.last, on_policy))
        published, state = None, None
        if place.last and place.substep == self.config.rl.substeps - 1:
            published = learner.publish()
            self.version = published.version
            state = learner.state() if place.step % self.config.checkpoint.every_steps == 0 else None
        lags = {"policy/lag_mean": lag_mean, "policy/lag_max": lag_max}
        self.ready_at = time.perf_counter()
        seconds = {
            "time/waiting_s": waited,
            "time/reference_s": referred - began,
            "time/advantage_s": centred - referred,
            "time/learn_s": self.ready_at - centred,
        }
        return Learned(
            version, reference, datums, Made(update.refs, {**update.facts, **lags}), published, state, seconds
        )

    # losses

    def settle_down(self, back: Rewound) -> int:
        """Let the threads come to rest, forget what was in flight. Returns the step after which the learner stands."""
        self.stopping = True
        self.stages.samplers.forget()
        self.close(wait=True)
        if isinstance(self.failed, Rewound) and self.failed.step is not None:
            return self.failed.step  # nothing has touched the learner since
        while True:
            try:
                while back.step is None and self._is_made(self.done + 1):
                    self._finish(self.done + 1)
                if any(piece.learning and not piece.learning.cancelled() for piece in self._ahead()):
                    self.stages.learner.restore()  # it may have gone on meanwhile, or is in the middle of a step
                return self.done if back.step is None else back.step
            except Rewound as again:
                self.stages.samplers.forget()
                if again.step is not None:
                    return again.step

    def _is_made(self, step: int) -> bool:
        made = [piece.learning for piece in self.steps.get(step, ())]
        return bool(made) and all(
            one is not None and one.done() and not one.cancelled() and one.exception() is None for one in made
        )

    def _ahead(self) -> list[Piece]:
        return [piece for pieces in self.steps.values() for piece in pieces]

    def close(self, wait: bool) -> None:
        for thread in (self.grading, self.learning):
            thread.shutdown(wait=wait, cancel_futures=True)
