"""Pool of sampler actors: dispatches groups to the least-loaded sampler, restarts dead samplers and resamples their
groups."""

from __future__ import annotations

import time
from collections.abc import Callable

from actors.cluster.placement import Placement
from actors.faults.actor_logs import Failures
from actors.faults.watchdog import Waiting, Watchdog, value
from actors.forking.servers import NO_SERVERS, ForkServers
from actors.stages.sampler_pool.dispatch import Dispatcher
from actors.stages.sampler_pool.membership import POLL_S, Member, Membership, Renew, pending_call
from rlsys.config import JobConfig
from rlsys.data.problems import occurrences
from rlsys.errors import ActorDiedError, DataLostError, WeightSyncError
from rlsys.metrics import Metrics
from rlsys.protocols import PublishedAdapter, RolloutsRef
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.update import Attestation

LOAD_POLL_S = 0.01


class SamplerPool:
    """The loop's ``Samplers``. ``renew`` and ``between``: see `Membership`; ``resampled``: see `Dispatcher`."""

    def __init__(
        self,
        config: JobConfig,
        placement: Placement,
        failures: Failures,
        note: Callable[[str], None],
        renew: Renew,
        between: Callable[[], None] = lambda: None,
        resampled: Callable[[Array], None] = lambda problems: None,
        servers: ForkServers = NO_SERVERS,
    ) -> None:
        self.config, self.failures = config, failures
        self.asleep = False
        self.membership = Membership(
            config,
            placement,
            failures,
            note,
            renew,
            between,
            requeue=lambda member: self.dispatcher.requeue(member),
            servers=servers,
        )
        self.dispatcher = Dispatcher(
            config.sampler, config.overlap, config.watchdog, failures, self.membership, resampled
        )

    @property
    def members(self) -> list[Member]:
        return self.membership.members

    @property
    def version(self) -> int:
        assert self.membership.current is not None
        return self.membership.current.version

    def close(self) -> None:
        self.membership.close()

    # completions

    def wait(self, ticket: int) -> RolloutsRef:
        try:
            while ticket in self.dispatcher.batches:
                self._advance(POLL_S)
        finally:
            self.dispatcher.batches.pop(ticket, None)  # after an error: no longer waited for
        rollouts = self.dispatcher.finished.pop(ticket)
        if self._shares_gpus and not (self.dispatcher.batches or self.dispatcher.in_flight):
            self._all("sleep", "giving the GPU's memory to the learner")
            self.asleep = True
        return rollouts

    def submit(
        self,
        split: str,
        problems: Array,
        n: int,
        params: SamplingParams,
        occurrence: Array | None = None,
        urgent: bool = False,
    ) -> int:
        self._wake()
        counted = occurrences(problems) if occurrence is None else occurrence
        self.membership.tend()  # first: what it raises leaves no ticket behind
        ticket = self.dispatcher.add(split, problems, counted, n, params, urgent)
        self.dispatcher.dispatch()
        return ticket

    def collect(self, timeout_s: float) -> list[tuple[int, RolloutsRef]]:
        if not self.dispatcher.finished:
            self._advance(timeout_s)
        done = list(self.dispatcher.finished.items())
        self.dispatcher.finished.clear()
        return done

    def forget(self) -> None:
        self.dispatcher.forget()

    def _advance(self, timeout_s: float) -> None:
        """Dispatch what is queued and take the answers that have arrived; wait for one up to the timeout."""
        self.membership.tend()
        self.dispatcher.dispatch()
        if self.dispatcher.in_flight:
            self.dispatcher.receive(timeout_s)
            self.dispatcher.dispatch()
        elif self.dispatcher.has_queued:
            self.membership.wait_for_joining()
        else:
            time.sleep(timeout_s)
        self.dispatcher.finish()

    # weights

    def load(self, update: PublishedAdapter) -> Metrics:
        membership = self.membership
        if membership.is_current(update.version, update.digest):
            return {"sync/bytes": 0.0}  # every group agreed, so the optimizer did not step: the samplers have this one
        self._wake()
        reload = membership.current is not None and update.version <= membership.current.version
        membership.current = update
        dog = Watchdog("sync", self.config.watchdog.limit_of("sync"), self.failures)
        asked = {membership.loading(member, reload): member for member in membership.serving}
        attested: list[Attestation] = []
        while asked:
            if self.dispatcher.in_flight:
                self._advance(LOAD_POLL_S)  # the others continue, each on the version that it has attested
            for waiting in dog.wait_any(list(asked), 0.0 if self.dispatcher.in_flight else POLL_S):
                member = asked.pop(waiting)
                try:
                    attested.append(value(waiting, self.failures))
                except ActorDiedError as error:
                    if member.joining is None:  # else it has been replaced already
                        membership.replace(member, error)
                except DataLostError as error:
                    membership.renew(error)
                    update = membership.current  # the learner may have moved on, or rolled back, meanwhile
                    asked = {
                        membership.loading(other, update.version <= other.version): other
                        for other in membership.serving
                        if other.version != update.version
                    }
                    break
                else:
                    refuse_unattested(attested[-1], member.name, update, self.config.run.name)
                    member.version = update.version
        while not membership.serving:
            membership.wait_for_joining()
        membership.deaths = 0
        return {
            "sync/canary_new": max((one.distance_new for one in attested), default=0.0),
            "sync/canary_previous": min((one.distance_previous for one in attested), default=0.0),
            "sync/separation": max((one.separation for one in attested), default=0.0),
            "sync/no_power": float(sum(not one.has_power for one in attested)),
            "sync/bytes": float(update.nbytes),
        }

    # GPUs that are shared with the learner: whichever works has the memory (not run on a GPU yet)

    @property
    def _shares_gpus(self) -> bool:
        return self.config.sampler.colocate and self.config.sampler_device == "cuda"

    def _wake(self) -> None:
        if self.asleep:
            self._all("wake", "taking the GPU's memory back")
            self.asleep = False

    def _all(self, method: str, what: str) -> None:
        dog = Watchdog("sync", self.config.watchdog.limit_of("sync"), self.failures)
        asked: dict[Waiting, Member] = {
            pending_call(member, getattr(member.actor, method).remote(), what): member
            for member in self.membership.serving
        }
        while asked:
            for waiting in dog.wait_any(list(asked), POLL_S):
                member = asked.pop(waiting)
                try:
                    value(waiting, self.failures)
                except ActorDiedError as error:
                    self.membership.replace(member, error)


def refuse_unattested(attested: Attestation, name: str, update: PublishedAdapter, run_id: str) -> None:
    """A sampler must have answered for this version and hold the bits that the learner published.

    Raises:
        WeightSyncError: it does not.
    """
    if (attested.run_id, attested.version, attested.digest) != (run_id, update.version, update.digest):
        raise WeightSyncError(
            f"{name} serves version {attested.version} of {attested.run_id!r} with hash {attested.digest}; wanted "
            f"version {update.version} of {run_id!r} with hash {update.digest}. It missed a weight sync, so its "
            "completions would come from other weights than the learner's; the run stops here"
        )
