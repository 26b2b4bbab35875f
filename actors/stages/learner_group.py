"""Learner ranks as one stage: every rank gets the same calls. When one dies, all restart from the last checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import ray

from actors.cluster.column_refs import BaseRef, base_argument
from actors.cluster.placement import Slot
from actors.faults.actor_logs import Failures
from actors.faults.watchdog import Waiting, Watchdog, value
from actors.forking.servers import NO_SERVERS, ForkServers
from actors.learner_actor import WATCH, LearnerActor
from rlsys.architectures.precision import rounding_note
from rlsys.config import JobConfig, Stage
from rlsys.data.problems import ProblemSet
from rlsys.datums import DatumBatch
from rlsys.errors import ActorDiedError, DataLostError, RlsysError, WeightSyncError
from rlsys.protocols import LogprobsRef, MinibatchPosition, PublishedAdapter, Ref, RolledBack, RolloutsRef
from rlsys.run_state.resume import Resume

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from rlsys.weight_sync.canary import StartupProbe

POLL_S = 0.5
ROOT_CAUSE_S = 3.0  # for the death of a rank to be reported, after another rank reported the loss of its peer


@dataclass(frozen=True, slots=True)
class LearnerInit:
    """Arguments that every rank starts with."""

    base: BaseRef
    train: Ref[ProblemSet]


class CheckpointSource(Protocol):
    """Where ranks restart from: a run's store, or the checkpoint of an evaluation."""

    def latest(self) -> Resume | None: ...


class LearnerGroup:
    """The loop's ``Learner``. ``flush``: waits for the checkpoint that is being written, if there is one.

    Two threads may use it at once: calls are serialized, and a death that both see causes one restart.
    """

    def __init__(
        self,
        config: JobConfig,
        store: CheckpointSource,
        failures: Failures,
        note: Callable[[str], None],
        servers: ForkServers = NO_SERVERS,
    ) -> None:
        self.config, self.store, self.failures, self.note = config, store, failures, note
        self.servers = servers
        self.ranks: list[ActorHandle] = []
        self.slots: Sequence[Slot] = ()
        self.init: LearnerInit | None = None
        self.deaths = 0  # since the last finished step
        self.flush: Callable[[], None] = lambda: None
        self.lives = 0  # number of launches
        self._loading: list[ObjectRef] = []  # answers of `LearnerActor.load`
        self.ended = False
        self._one_at_a_time = threading.RLock()

    # start and end of the job

    def launch(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.lives += 1
        self._loading = []
        remote = ray.remote(concurrency_groups={WATCH: 1})(LearnerActor)
        options = [self.servers.learner_options(slot) for slot in slots]
        self.ranks = [remote.options(**each).remote(self.config, i) for i, each in enumerate(options)]

    def make_base(self, on_news: Callable[[list[dict[str, float]]], None]) -> Mapping[str, bytes]:
        """The packed folder of a base trained from scratch, by one rank; if it dies, training starts over."""
        while True:
            made, metrics = self.ranks[0].make_base.options(num_returns=2).remote()
            dog = Watchdog("base", self.config.watchdog.limit_of("base"), self.failures)
            waiting, seen = Waiting(metrics, self._name(0), "making the base", self.ranks[0]), 0
            try:
                while True:
                    done = dog.wait_any([waiting], POLL_S)
                    news = self._ask(self.ranks[0].supervised_since.remote(seen), "base", "progress of the base")
                    seen += len(news)
                    on_news(news)
                    if done:
                        value(waiting, self.failures)
                        files: Mapping[str, bytes] = self._ask(made, "base", "handing over the base")
                        return files
            except ActorDiedError as error:
                self._relaunch(error)

    def begin(self, base: BaseRef) -> None:
        """Have the only rank load the base, without waiting; several begin with `start`, since the first one has to
        tell where they meet. `start` reports what goes wrong."""
        if len(self.ranks) == 1:
            self._load(base, None)

    def start(self, init: LearnerInit) -> None:
        """Load the base on every rank, unless that has begun, and the run's last checkpoint if there is one."""
        self.init = init
        while True:
            try:
                return self._start()
            except ActorDiedError as error:
                self._relaunch(error)

    def probe(self) -> Ref[StartupProbe]:
        """An adapter with a large B, to prove that adapters reach a sampler's forward pass.

        Raises:
            RolledBack: the learner had to restart.
        """
        with self._one_at_a_time:
            refs = [rank.probe.remote() for rank in self.ranks]
            self._or_recover(refs, "start", "making the probe adapter")
            return Ref(refs[0])

    def close(self) -> None:
        """End of the job: no thread restarts the ranks any more."""
        self.ended = True
        self._kill()

    def _kill(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    # the loop's stages

    def reference(self, rollouts: RolloutsRef) -> LogprobsRef:
        with self._one_at_a_time:
            parts = [ref.value for ref in rollouts.refs]
            calls = [rank.reference.remote(*parts) for rank in self.ranks]
            self._or_recover([metrics for _, metrics in calls], "reference", "log-probabilities under the reference")
            return LogprobsRef((Ref(calls[0][0]),), {})

    def learn(self, datums: Ref[DatumBatch], position: MinibatchPosition) -> LogprobsRef:
        with self._one_at_a_time:
            calls = [rank.learn.remote(datums.value, position) for rank in self.ranks]
            metrics = self._or_recover([metrics for _, metrics in calls], "learn", f"step {position.step}")[0]
            self.deaths = 0
            return LogprobsRef((Ref(calls[0][0]),), metrics)

    def publish(self) -> PublishedAdapter:
        with self._one_at_a_time:
            calls = [rank.publish.remote() for rank in self.ranks]
            label = self._or_recover([label for _, label in calls], "sync", "publishing the adapter")[0]
            if len(self.ranks) > 1:
                digests = self._or_recover([rank.digest.remote() for rank in self.ranks], "sync", "comparing adapters")
                self._refuse_apart(digests, label["version"])
            return PublishedAdapter(Ref(calls[0][0]), **label)

    def state(self) -> Waiting:
        """The answer of a call that packs a checkpoint of the present state."""
        with self._one_at_a_time:
            ref = self.ranks[0].state_files.remote()
            return Waiting(ref, self._name(0), "packing a checkpoint", self.ranks[0])

    def restore(self) -> NoReturn:
        self.recover(DataLostError("the learner: is in the middle of a step whose data is lost"))

    def recover(self, error: ActorDiedError | DataLostError, life: int | None = None) -> NoReturn:
        """Restart every rank from the last checkpoint, unless another thread has done so since launch number `life`.

        Raises:
            RolledBack: always, with the step of the checkpoint.
            ActorDiedError: too many ranks died without a finished step in between, or the job is over.
        """
        with self._one_at_a_time:
            if self.ended:
                raise error
            if life is None or life == self.lives:
                self._relaunch(error)
                assert self.init is not None
                self.start(self.init)
                self.note(f"the learner is back, after step {max(self._saved_step(), 0)}")
            raise RolledBack(self._saved_step())

    def _saved_step(self) -> int:
        resume = self.store.latest()
        return -1 if resume is None else resume.step

    # small parts

    def _start(self) -> None:
        assert self.init is not None
        resume = self.store.latest()
        files = None if resume is None else ray.put(dict(resume.files))
        if not self._loading:
            meeting_point = None
            if len(self.ranks) > 1:
                meeting_point = self._ask(self.ranks[0].meeting_point.remote(), "start", "finding a free port")
            self._load(self.init.base, meeting_point)
        refs = [rank.start.remote(self.init.train.value, files) for rank in self.ranks]
        wanted = self.config.model.dtype
        self.servers.note_unforked(
            self._results([rank.not_forked.remote() for rank in self.ranks], "start", "a fork"), self.note
        )
        for computed in {*self._results(self._loading, "start", "loading the base")} - {wanted}:
            self.note(rounding_note("the learner's CPU", wanted, computed))
        self._results(refs, "start", "starting the run")

    def _load(self, base: BaseRef, meeting_point: str | None) -> None:
        self._loading = [rank.load.remote(base_argument(base), meeting_point) for rank in self.ranks]

    def _relaunch(self, error: ActorDiedError | DataLostError) -> None:
        if self.ended:
            raise error
        self.deaths += 1
        limit = self.config.cluster.max_restarts
        if self.deaths > limit:
            raise self.failures.gone(f"learner ranks died {self.deaths} times without a step in between", limit)
        self.note(
            f"the learner restarts from the last checkpoint ({self.deaths} of {limit}): {str(error).splitlines()[0]}"
        )
        gone, self.ranks = self.ranks, []  # from here on no checkpoint of them can begin
        self.flush()
        for rank in gone:
            ray.kill(rank)
        self.launch(self.slots)

    def _or_recover(self, refs: Sequence[ObjectRef], stage: Stage, what: str) -> list[Any]:
        """As `_results`; a loss ends in RolledBack."""
        try:
            return self._results(refs, stage, what)
        except ActorDiedError as error:
            self.recover(error)
        except DataLostError as error:
            if len(self.ranks) > 1:  # some ranks may have received their copy, and wait for the others
                self.recover(error)
            self.note(f"{stage}: repeated, its input is lost: {error}")
            raise RolledBack(None) from error

    def _ask(self, ref: ObjectRef, stage: Stage, what: str) -> Any:
        """The answer of the first rank alone. Any: as `_results`."""
        return self._results([ref], stage, what)[0]

    def _results(self, refs: Sequence[ObjectRef], stage: Stage, what: str) -> list[Any]:
        """The answers of all ranks; of several errors, raises the one that caused the others. Any: a handle's methods
        have no types."""
        dog = Watchdog(stage, self.config.watchdog.limit_of(stage), self.failures)
        waits = [Waiting(ref, self._name(i), what, self.ranks[i], together="learner") for i, ref in enumerate(refs)]
        pending, errors, deadline = list(waits), list[RlsysError](), float("inf")
        while pending and time.monotonic() < deadline:
            for waiting in dog.wait_any(pending, POLL_S):
                pending.remove(waiting)
                try:
                    value(waiting, self.failures)
                except RlsysError as error:
                    errors.append(error)
                    deadline = min(deadline, time.monotonic() + ROOT_CAUSE_S)
        if errors:
            raise next((error for error in errors if isinstance(error, ActorDiedError)), errors[0])
        return [value(waiting) for waiting in waits]

    def _name(self, rank: int) -> str:
        return "learner" if self.config.learner.num_workers == 1 else f"learner rank {rank}"

    def _refuse_apart(self, digests: Sequence[str], version: int) -> None:
        if len(set(digests)) > 1:
            ranks = ", ".join(f"rank {rank} {digest}" for rank, digest in enumerate(digests))
            raise WeightSyncError(
                f"learner: the ranks hold different adapters at version {version}: {ranks}. Each made the same step "
                "from the same summed gradient, so the adapters must be equal to the bit; the run stops here"
            )
