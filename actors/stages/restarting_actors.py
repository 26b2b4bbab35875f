"""Graders and advantages as stages: actors without state, restarted when they die."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from actors.advantage_actor import AdvantageRequest, GroupAdvantageActor
from actors.cluster.column_refs import BaseRef, base_argument, pack_columns
from actors.faults.actor_logs import Failures
from actors.faults.watchdog import Watchdog, watched
from actors.forking.servers import NO_SERVERS, ForkServers
from actors.reward_actor import RecordRequest, RewardActor, ShowRequest
from rlsys.config import JobConfig, RlSection, Stage, WatchdogSection
from rlsys.data.problems import ProblemSet
from rlsys.datums import DatumBatch
from rlsys.errors import ActorDiedError, DataLostError
from rlsys.protocols import DatumsRef, LogprobsRef, Ref, RewardsRef, RolledBack, RolloutsRef, TrainedStep
from rlsys.types import Array

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from rlsys.rewards.rollout_samples import RolloutSample  # imports transformers, which the driver can do without

STOP_TIMEOUT_S = 5.0  # for the grader processes to end by themselves


class RestartingActor:
    """An actor without state: when it dies, a new one is started and its call repeated.

    Two threads may use it at once: a death that both see starts one new actor.
    """

    def __init__(
        self,
        who: str,
        make: Callable[[], ActorHandle],
        watchdog: WatchdogSection,
        max_restarts: int,
        failures: Failures,
        note: Callable[[str], None],
    ) -> None:
        self.who, self.make, self.failures, self.note = who, make, failures, note
        self.watchdog, self.max_restarts = watchdog, max_restarts
        self.actor = make()
        self.deaths = 0  # since the last call that was answered
        self.ended = False
        self._healing = threading.RLock()

    def call(
        self, stage: Stage, what: str, method: str, *arguments: object, results: int = 2
    ) -> tuple[list[ObjectRef], Any]:
        """Of a method with so many results: (Ray's references to all but the last, the last one itself). Any: a
        handle's methods have no types.

        Raises:
            RolledBack: its input is lost with a node; redo the step.
            ActorDiedError: more deaths than cluster.max_restarts allows.
        """
        while True:
            actor = self._live_actor()
            *made, metrics = getattr(actor, method).options(num_returns=results).remote(*arguments)
            try:
                answer = self._wait(metrics, stage, what, actor)
            except ActorDiedError as error:
                self._restart(error, actor)
            except DataLostError as error:
                self.note(f"{self.who}: {what}: the step is repeated, its input is lost: {error}")
                raise RolledBack(None) from error
            else:
                self.deaths = 0
                return made, answer

    def ask(self, stage: Stage, what: str, method: str, *arguments: object) -> Any:
        """The only result of a method. Any: as `call`."""
        actor = self._live_actor()
        return self._wait(getattr(actor, method).remote(*arguments), stage, what, actor)

    def close(self) -> None:
        """End of the job: no thread that still waits restarts the actor."""
        self.ended = True
        ray.kill(self.actor)

    def started(self) -> None:
        """Called with a new actor, before it gets calls."""

    def _live_actor(self) -> ActorHandle:
        """The actor; waits while another thread restarts it."""
        with self._healing:
            return self.actor

    def _wait(self, ref: ObjectRef, stage: Stage, what: str, actor: ActorHandle) -> Any:  # as `call`
        limit = self.watchdog.limit_of(stage)
        return watched(ref, Watchdog(stage, limit, self.failures), self.who, what, actor)

    def _restart(self, error: ActorDiedError, dead: ActorHandle) -> None:
        """Start an actor in place of `dead`, unless another thread has done so."""
        with self._healing:
            while self.actor is dead:
                if self.ended:
                    raise error
                ray.kill(dead)
                self.deaths += 1
                limit = self.max_restarts
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

    _stopping: ObjectRef | None = None  # the call that ends the grader processes

    def __init__(
        self, config: JobConfig, failures: Failures, note: Callable[[str], None], servers: ForkServers = NO_SERVERS
    ) -> None:
        remote = ray.remote(concurrency_groups={"watch": 1})(RewardActor).options(**servers.driver_node_options())
        make = partial(remote.remote, config)
        self.servers = servers
        super().__init__("rewards", make, config.watchdog, config.cluster.max_restarts, failures, note)
        self.config = config
        self.base: BaseRef | None = None
        self.reported_failures: set[str] = set()

    def start(self, base: BaseRef) -> None:
        self.base = base
        try:
            self.started()
        except ActorDiedError as error:
            self._restart(error, self.actor)

    def started(self) -> None:
        assert self.base is not None
        why = self.ask("start", "starting", "start", base_argument(self.base))
        self.servers.note_unforked([why], self.note)

    def problems(self, split: str) -> Ref[ProblemSet]:
        return Ref(self.actor.problems.remote(split))

    def metrics(self) -> dict[str, float]:
        """Numbers of problems of the task, and of problems that were left out."""
        metrics: dict[str, float] = self.ask("start", "counting problems", "task_facts")
        return metrics

    def digest(self) -> str:
        """Hash of the training problems."""
        digest: str = self.ask("start", "hashing the problems", "digest")
        return digest

    def grade(self, split: str, rollouts: RolloutsRef) -> RewardsRef:
        refs = [ref.value for ref in rollouts.refs]
        rewards, (metrics, failure, *groups) = self.call("grade", "grading completions", "grade", split, *refs)
        self._note_failure(metrics, failure)
        return RewardsRef(tuple(Ref(reward) for reward in rewards), metrics, *groups)

    def _note_failure(self, metrics: Mapping[str, float], failure: str) -> None:
        """The first failure of each kind; metrics count them all."""
        last = failure.strip().rpartition("\n")
        kind = last[2] if last[1] else failure.rpartition(": ")[2]  # without the name of its problem
        if failure and kind not in self.reported_failures:
            self.reported_failures.add(kind)
            failed = metrics["reward/timeouts"] + metrics["reward/errors"]
            self.note(
                f"rewards: {failed:g} of {metrics['reward/completions']:g} grades failed and count as "
                f"rewards.failed_grade {self.config.rewards.failed_grade:g}; the first, of {failure}"
            )

    def show(
        self, split: str, count: int, rollouts: RolloutsRef, rewards: RewardsRef, trained: TrainedStep | None = None
    ) -> list[RolloutSample]:
        """Some completions as text with reward and advantages, for people; an empty list where they are lost."""
        columns = _minibatch_columns(trained) if trained else ((), (), ())
        lengths, refs = pack_columns(rollouts.refs, rewards.refs, *columns)
        firsts = first_rows(trained, self.config.rl.samples_per_problem) if trained else []
        request = ShowRequest(split, count, tuple(firsts), lengths)
        return self._ask_or_note("shown", "show", request, refs) or []

    def record(self, run_dir: str, step: int, trained: TrainedStep) -> None:
        """Have the step's rollouts written into the run directory, which is on this actor's machine."""
        reference = trained.reference.refs if trained.reference else ()
        num_minibatches = self.config.rl.substeps * self.config.overlap.minibatches
        lengths, refs = pack_columns(trained.rollouts.refs, trained.rewards.refs, reference)
        request = RecordRequest(run_dir, step, trained.version, num_minibatches, lengths)
        self._ask_or_note("recorded", "record", request, refs)

    def write_problems(self, run_dir: str) -> None:
        self.ask("start", "writing the problems down", "write_problems", run_dir)

    def _ask_or_note(
        self, what: str, method: str, request: ShowRequest | RecordRequest, refs: Sequence[ObjectRef]
    ) -> list[RolloutSample] | None:
        """A call that a run can do without: a loss is only noted."""
        actor = self.actor
        try:
            answer: list[RolloutSample] | None = self.ask("grade", f"completions are {what}", method, request, *refs)
            return answer
        except (ActorDiedError, DataLostError) as error:
            self.note(f"rewards: the rollouts of this step cannot be {what}: {error}")
            if isinstance(error, ActorDiedError):
                self._restart(error, actor)
            return None

    def ask_to_stop(self) -> None:
        """Begin the end of the job, without waiting: the grader processes end by themselves."""
        self.ended = True
        if self._stopping is None:
            self._stopping = self.actor.stop.remote()

    def close(self) -> None:
        self.ask_to_stop()
        ray.wait([self._stopping], timeout=STOP_TIMEOUT_S)
        self._stopping = None
        super().close()


class AdvantageActors(RestartingActor):
    """The loop's ``Advantages``."""

    def __init__(
        self,
        rl: RlSection,
        watchdog: WatchdogSection,
        max_restarts: int,
        failures: Failures,
        note: Callable[[str], None],
        servers: ForkServers = NO_SERVERS,
    ) -> None:
        remote = ray.remote(GroupAdvantageActor).options(**servers.driver_node_options())
        super().__init__("advantages", partial(remote.remote, rl), watchdog, max_restarts, failures, note)

    def compute_advantages(
        self, rollouts: RolloutsRef, rewards: RewardsRef, reference: LogprobsRef | None, num_minibatches: int
    ) -> DatumsRef:
        lengths, refs = pack_columns(rollouts.refs, rewards.refs, reference.refs if reference else ())
        made, (metrics, outcomes) = self.call(
            "advantage",
            "computing advantages",
            "compute_advantages",
            AdvantageRequest(num_minibatches, lengths),
            *refs,
            results=2 * num_minibatches + 1,
        )
        batches = tuple(Ref[DatumBatch](ref) for ref in made[:num_minibatches])
        rows = tuple(Ref[Array](ref) for ref in made[num_minibatches:])
        return DatumsRef(batches, metrics, rows, outcomes)


def first_rows(trained: TrainedStep, samples: int) -> list[int]:
    """Of each minibatch: the completion of the step that its rows call 0. Rows count within one call for advantages."""
    firsts, before = list[int](), 0
    for datums in trained.datums:
        firsts += [before] * len(datums.batches)
        before += len(datums.outcomes) * samples
    return firsts


def _minibatch_columns(trained: TrainedStep) -> tuple[list[Ref[DatumBatch]], list[Ref[Array]], list[Ref[Array]]]:
    """Datums, rows and the learner's p of each minibatch."""
    return (
        [ref for datums in trained.datums for ref in datums.batches],
        [ref for datums in trained.datums for ref in datums.rows],
        [ref for learned in trained.learned for ref in learned.refs],
    )
