"""Graders and advantages as stages: actors without a state of their own, started again where they die."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.advantage_actor import GroupAdvantageActor
from actors.cluster.column_refs import by_reference
from actors.faults.actor_logs import Failures
from actors.faults.watchdog import Watchdog, watched
from actors.reward_actor import RewardActor
from rlsys.config import JobConfig
from rlsys.errors import ActorDiedError, DataLostError
from rlsys.protocols import BatchRef, DatumsRef, RewardsRef, RolledBack, TrainedStep

STOP_TIMEOUT_S = 5.0  # for the grader processes to end by themselves


def driver_node_options() -> dict[str, Any]:
    """They run while learner and samplers wait, so they hold no core of their own; and they live where the driver does,
    since what they made is needed for as long as it lives. (Ray 2.60 does not heed soft affinity without a core.)"""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


class RestartingActor:
    """An actor that is made again when it dies, and its call repeated: nothing that it does is lost with it.

    Two threads may use it at once: a death that both see is healed once.
    """

    def __init__(
        self, who: str, make: Callable[[], Any], config: JobConfig, failures: Failures, note: Callable[[str], None]
    ) -> None:
        self.who, self.make, self.config, self.failures, self.note = who, make, config, failures, note
        self.actor = make()
        self.deaths = 0  # without a call that was answered in between
        self.ended = False
        self._healing = threading.RLock()

    def call(self, stage: str, what: str, method: str, *arguments: Any, results: int = 2) -> tuple[list[Any], Any]:
        """(references to all results but the last, the last result) of a method with so many.

        Raises:
            Rewound: what it was to work on is lost with its node; the step has to be done again.
            ActorDiedError: it died more often than cluster.max_restarts allows.
        """
        while True:
            actor = self._live_actor()
            *made, metrics = getattr(actor, method).options(num_returns=results).remote(*arguments)
            try:
                answer = self._wait(metrics, stage, what, actor)
            except ActorDiedError as error:
                self._restart(error, actor)
            except DataLostError as error:
                self.note(f"{self.who}: {what}: the step is done again, what it worked on is lost: {error}")
                raise RolledBack(None) from error
            else:
                self.deaths = 0
                return made, answer

    def ask(self, stage: str, what: str, method: str, *arguments: Any) -> Any:
        """The only result of a method."""
        actor = self._live_actor()
        return self._wait(getattr(actor, method).remote(*arguments), stage, what, actor)

    def close(self) -> None:
        """At the job's end: from now on nobody makes it again, whatever thread still waits for it."""
        self.ended = True
        ray.kill(self.actor)

    def started(self) -> None:
        """Called once the actor has been made anew; what else it needs to be whole again."""

    def _live_actor(self) -> Any:
        """The actor; where a thread is making it anew, once that is done."""
        with self._healing:
            return self.actor

    def _wait(self, ref: Any, stage: str, what: str, actor: Any) -> Any:
        limit = getattr(self.config.watchdog, f"{stage}_s")
        return watched(ref, Watchdog(stage, limit, self.failures), self.who, what, actor)

    def _restart(self, error: ActorDiedError, dead: Any) -> None:
        """In the place of the actor that died; not where another thread has made a new one since."""
        with self._healing:
            while self.actor is dead:
                if self.ended:
                    raise error
                ray.kill(dead)
                self.deaths += 1
                limit = self.config.cluster.max_restarts
                if self.deaths > limit:
                    raise self.failures.gone(f"{self.who} died {self.deaths} times without finishing a call", limit)
                self.note(f"{self.who} died and is replaced ({self.deaths} of {limit}): {str(error).splitlines()[0]}")
                self.actor = self.make()
                try:
                    self.started()
                except ActorDiedError as again:
                    error, dead = again, self.actor


class GraderActors(RestartingActor):
    """The loop's ``Graders``."""

    def __init__(self, config: JobConfig, failures: Failures, note: Callable[[str], None]) -> None:
        remote = ray.remote(concurrency_groups={"watch": 1})(RewardActor).options(**by_reference(driver_node_options()))
        super().__init__("rewards", lambda: remote.remote(config), config, failures, note)
        self.base: Any = None
        self.reported_failures: set[str] = set()

    def start(self, base: Any) -> None:
        self.base = base
        try:
            self.started()
        except ActorDiedError as error:
            self._restart(error, self.actor)

    def started(self) -> None:
        self.ask("start", "starting", "start", self.base)

    def problems(self, split: str) -> Any:
        """A reference to a problem set."""
        return self.actor.problems.remote(split)

    def metrics(self) -> dict[str, float]:
        """Of the task: problems, and those that were left out."""
        metrics: dict[str, float] = self.ask("start", "counting problems", "task_facts")
        return metrics

    def digest(self) -> str:
        """Of the problems that are trained on."""
        digest: str = self.ask("start", "hashing the problems", "digest")
        return digest

    def grade(self, split: str, rollouts: BatchRef) -> RewardsRef:
        rewards, (metrics, failure, *groups) = self.call("grade", "grading completions", "grade", split, *rollouts.refs)
        self._note_failure(metrics, failure)
        return RewardsRef(tuple(rewards), metrics, *groups)

    def _note_failure(self, metrics: Mapping[str, float], failure: str) -> None:
        """The first failure of each kind; metrics count them all."""
        last = failure.strip().rpartition("\n")
        kind = last[2] if last[1] else failure.rpartition(": ")[2]  # without the problem that it was met at
        if failure and kind not in self.reported_failures:
            self.reported_failures.add(kind)
            failed = metrics["reward/timeouts"] + metrics["reward/errors"]
            self.note(
                f"rewards: {failed:g} of {metrics['reward/completions']:g} grades failed and count as "
                f"rewards.failed_grade {self.config.rewards.failed_grade:g}; the first, of {failure}"
            )

    def show(
        self, split: str, rows: int, rollouts: BatchRef, rewards: BatchRef, trained: TrainedStep | None = None
    ) -> list[Any]:
        """Some completions as text with reward and advantages: a few, for people. None where they are lost."""
        columns = [rollouts.refs, rewards.refs, *(_minibatch_refs(trained) if trained else ((), (), ()))]
        firsts = first_rows(trained, self.config.rl.samples_per_problem) if trained else []
        shown = self._ask_or_note("shown", "show", split, rows, firsts, columns)
        return shown or []

    def record(self, run_dir: str, step: int, trained: TrainedStep) -> None:
        """Have the step's rollouts written into the run directory, which is on this actor's machine."""
        reference = trained.reference.refs if trained.reference else ()
        num_minibatches = self.config.rl.substeps * self.config.overlap.minibatches
        columns = [trained.rollouts.refs, trained.rewards.refs, reference]
        self._ask_or_note("recorded", "record", run_dir, step, trained.version, num_minibatches, columns)

    def write_problems(self, run_dir: str) -> None:
        self.ask("start", "writing the problems down", "write_problems", run_dir)

    def _ask_or_note(self, what: str, method: str, *arguments: Any) -> Any:
        """What a run can do without: said where it is lost. The last argument: tuples of references."""
        *others, columns = arguments
        sizes = [len(column) for column in columns]
        flat = [ref for column in columns for ref in column]
        actor = self.actor
        try:
            return self.ask("grade", f"completions are {what}", method, *others, sizes, *flat)
        except (ActorDiedError, DataLostError) as error:
            self.note(f"rewards: the rollouts of this step cannot be {what}: {error}")
            if isinstance(error, ActorDiedError):
                self._restart(error, actor)
            return None

    def close(self) -> None:
        self.ended = True
        ray.wait([self.actor.stop.remote()], timeout=STOP_TIMEOUT_S)
        super().close()


class AdvantageActors(RestartingActor):
    """The loop's ``Advantages``."""

    def __init__(self, config: JobConfig, failures: Failures, note: Callable[[str], None]) -> None:
        remote = ray.remote(GroupAdvantageActor).options(**by_reference(driver_node_options()))
        super().__init__("advantages", lambda: remote.remote(config.rl), config, failures, note)

    def compute_advantages(
        self, rollouts: BatchRef, rewards: BatchRef, reference: BatchRef | None, num_minibatches: int
    ) -> DatumsRef:
        columns = [rollouts.refs, rewards.refs, reference.refs if reference else ()]
        sizes = [len(column) for column in columns]
        flat = [ref for column in columns for ref in column]
        made, (metrics, outcomes) = self.call(
            "advantage",
            "centring rewards",
            "compute_advantages",
            num_minibatches,
            sizes,
            *flat,
            results=2 * num_minibatches + 1,
        )
        return DatumsRef(tuple(made[:num_minibatches]), metrics, tuple(made[num_minibatches:]), outcomes)


def first_rows(trained: TrainedStep, samples: int) -> list[int]:
    """The step's number of the completion that each piece's rows call 0: they count within what was centred at once."""
    firsts, before = list[int](), 0
    for one in trained.datums:
        firsts += [before] * len(one.refs)
        before += len(one.outcomes) * samples
    return firsts


def _minibatch_refs(trained: TrainedStep) -> list[tuple[Any, ...]]:
    """References to the pieces' datums, to whose completions they are, and to the learner's p of them."""
    return [
        tuple(ref for one in trained.datums for ref in one.refs),
        tuple(ref for one in trained.datums for ref in one.rows),
        tuple(ref for one in trained.learned for ref in one.refs),
    ]
