"""Members of the sampler pool: start, join, restart and leave.

A member serves only once it has attested the current version. All of this happens in the thread in which the loop waits
for the pool; nothing runs in the background.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from actors.cluster.column_refs import BaseRef, base_argument
from actors.cluster.placement import Placement, Slot
from actors.faults.actor_logs import Failures
from actors.faults.watchdog import Waiting, Watchdog, value
from actors.forking.servers import NO_SERVERS, ForkServers
from actors.sampler_actor import SamplerActor
from rlsys.architectures.precision import rounding_note
from rlsys.config import JobConfig
from rlsys.data.problems import ProblemSet
from rlsys.errors import ActorDiedError, ClusterError, DataLostError, RlsysError, StalledError
from rlsys.protocols import PublishedAdapter, Ref
from rlsys.weight_sync.update import Attestation

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from rlsys.weight_sync.canary import StartupProbe

POLL_S = 0.5
STOP_TIMEOUT_S = 5.0  # for an engine to end by itself before its actor is killed


@dataclass(frozen=True, slots=True)
class SamplerInit:
    """Arguments that every sampler starts with, later ones too."""

    base: BaseRef
    train: Ref[ProblemSet]
    held_out: Ref[ProblemSet]
    probe: Ref[StartupProbe]


Renew = Callable[[], tuple[SamplerInit, PublishedAdapter]]


@dataclass(eq=False)
class Member:
    """One sampler of the pool; a restart gives it another actor."""

    index: int
    slot: Slot
    actor: ActorHandle
    joining: Waiting | None = None  # until this is done it gets no work
    unproven: bool = False
    newcomer: bool = False  # came by `resize` and has not served yet: the job can do without it
    held: int = 0  # completions that it has been asked for
    version: int = -1  # the last one that it attested
    leaving: bool = False
    host: ObjectRef | None = None  # the answer of `SamplerActor.process`
    host_pid: int | None = None  # once it serves

    @property
    def name(self) -> str:
        return f"sampler {self.index}"

    @property
    def serves(self) -> bool:
        return self.joining is None and not self.leaving


class Membership:
    """`renew`: makes the samplers' arguments and the current version again after a node took them with it; raises
    RolledBack where the learner had to restart for that. `between`: handles requests from outside. `requeue`: called
    with a member that died, whose groups have to be sampled again."""

    def __init__(
        self,
        config: JobConfig,
        placement: Placement,
        failures: Failures,
        note: Callable[[str], None],
        renew: Renew,
        between: Callable[[], None],
        requeue: Callable[[Member], None],
        servers: ForkServers = NO_SERVERS,
    ) -> None:
        self.config, self.placement, self.failures, self.note = config, placement, failures, note
        self._renew_init, self.between, self.requeue = renew, between, requeue
        self.servers = servers
        self.members: list[Member] = []
        self.spare: list[Slot] = []
        self.init: SamplerInit | None = None
        self.current: PublishedAdapter | None = None
        self.deaths = 0  # since the last version that was loaded
        self._stopping: list[ObjectRef] = []
        self._rounding_noted = False
        self._starts = Watchdog("start", config.watchdog.limit_of("start"), failures)

    # start and end of the job

    def launch(self, slots: Sequence[Slot]) -> None:
        """Create the actors; they import vLLM while the base is being made."""
        self.members = [Member(i, slot, self._actor(i, slot)) for i, slot in enumerate(slots)]
        for member in self.members:
            self._ask_host(member)
            member.actor.preload.remote()

    def begin(self, base: BaseRef) -> None:
        """Start every engine that has not begun to start, without waiting."""
        for member in [one for one in self.members if one.joining is None]:
            member.joining = pending_call(member, member.actor.start.remote(base_argument(base)), "starting vLLM")
            member.unproven = True

    def start(self, init: SamplerInit) -> None:
        """Have every engine prove that adapters reach its forward pass."""
        self.init = init
        while any(member.joining for member in self.members):
            self.wait_for_joining()

    def ask_to_stop(self) -> None:
        """Begin the end of the job, without waiting: every engine stops."""
        if not self._stopping:
            self._stopping = [member.actor.stop.remote() for member in self.members]

    def close(self) -> None:
        """Stop every engine, then kill every actor."""
        self.ask_to_stop()
        if self._stopping:
            ray.wait(self._stopping, num_returns=len(self._stopping), timeout=STOP_TIMEOUT_S)
        for member in self.members:
            ray.kill(member.actor)
        self.members, self._stopping = [], []

    # joining

    @property
    def serving(self) -> list[Member]:
        return [member for member in self.members if member.serves]

    def tend(self) -> None:
        """Let members serve that have finished joining, and handle requests from outside; never blocks."""
        self.between()
        joining = self._joining()
        if not joining:
            return
        # Without the watchdog: while others work, a member may take its time to join.
        ready = ray.wait([waiting.ref for waiting in joining], num_returns=len(joining), timeout=0)[0]
        for waiting, member in joining.items():
            if waiting.ref in ready:
                self._joined(member)

    def wait_for_joining(self) -> None:
        """No member serves: wait for those that are joining, but not for a placement that the cluster cannot give."""
        joining = self._joining()
        if not joining:
            raise StalledError("no sampler serves, and none is starting")
        self.between()
        for waiting in self._starts.wait_any(list(joining), POLL_S):
            self._joined(joining[waiting])
        for waiting, member in joining.items():
            waited = time.monotonic() - waiting.since
            lacking = self.placement.lacking(member.slot) if waited > POLL_S and member.joining is waiting else None
            if lacking and waited > self.config.watchdog.limit_of("sample"):
                raise StalledError(
                    f"sample: no sampler serves, and {member.name} has waited {waited:.0f} s "
                    f"(watchdog.stages.sample) for a place: {lacking}. {self.failures.first()}"
                )

    def is_current(self, version: int, digest: str) -> bool:
        return self.current is not None and (self.current.version, self.current.digest) == (version, digest)

    def loading(self, member: Member, reload: bool) -> Waiting:
        """Ask a member to load the current version. `reload`: its number has been used before."""
        assert self.current is not None
        ref = member.actor.load.remote(self.current.ref.value, self.config.checks.max_canary_diff, reload)
        return pending_call(member, ref, f"loading version {self.current.version}")

    def _joining(self) -> Mapping[Waiting, Member]:
        return {member.joining: member for member in self.members if member.joining}

    def _ask_host(self, member: Member) -> None:
        member.host, member.host_pid = member.actor.process.remote(), None

    def _join(self, member: Member) -> None:
        assert self.init is not None
        self._ask_host(member)
        member.unproven = False  # `replace` has it prove itself
        init, update = self.init, None if self.current is None else self.current.ref.value
        arguments = base_argument(init.base), init.train.value, init.held_out.value, init.probe.value
        ref = member.actor.replace.remote(*arguments, update, self.config.checks.max_canary_diff)
        member.joining = pending_call(member, ref, "starting vLLM and loading the current version")

    def _joined(self, member: Member) -> None:
        """One stage of joining is done: serve, or load the version that was published meanwhile."""
        assert member.joining is not None and self.init is not None
        try:
            attested: Attestation | None = value(member.joining, self.failures)
        except ActorDiedError as error:
            self.replace(member, error)
            return
        except DataLostError as error:
            self.renew(error)
            self._join(member)
            return
        except RlsysError as error:
            if not member.newcomer:
                raise
            self.replace(member, error)
            return
        if member.unproven:
            member.unproven = False
            init = self.init
            arguments = init.train.value, init.held_out.value, init.probe.value
            ref = member.actor.join.remote(*arguments, self.config.checks.max_canary_diff)
            member.joining = pending_call(member, ref, "proving that adapters reach its forward pass")
            return
        if self.current is None or (attested and self.is_current(attested.version, attested.digest)):
            member.joining, member.newcomer = None, False
            self._know_host(member)
            if self.current is not None:
                member.version = self.current.version
                self.note(f"{member.name} serves version {self.current.version}")
            return
        member.joining = self.loading(member, reload=True)

    def _know_host(self, member: Member) -> None:
        assert member.host is not None
        if member.host_pid is None and ray.wait([member.host], timeout=0)[0]:
            member.host_pid, why, computing = ray.get(member.host)
            self.servers.note_unforked([why], self.note)
            self._note_rounding(member, computing)

    def _note_rounding(self, member: Member, computing: str) -> None:
        wanted = self.config.model.dtype
        if computing != wanted and not self._rounding_noted:
            self._rounding_noted = True
            self.note(rounding_note(f"the CPU of {member.name}", wanted, computing))

    # restarts

    def replace(self, member: Member, error: RlsysError) -> None:
        """Start another actor in the slot of a member that died.

        Raises:
            ActorDiedError: the first death, when more than cluster.max_restarts came since the last version was loaded.
        """
        ray.kill(member.actor)  # its engine may be dead and the actor not
        member.held = 0
        self.requeue(member)
        if member.leaving or member.newcomer:
            self.members.remove(member)
            self.spare.append(member.slot)
            if member.newcomer:
                self.note(f"{member.name} could not join, the job continues without it: {str(error).splitlines()[0]}")
            return
        self.deaths += 1
        limit = self.config.cluster.max_restarts
        if self.deaths > limit:
            raise self.failures.gone(f"samplers died {self.deaths} times without a step in between", limit)
        self.note(f"{member.name} died and is replaced ({self.deaths} of {limit}): {str(error).splitlines()[0]}")
        member.actor = self._actor(member.index, member.slot)
        self._join(member)

    def renew(self, error: DataLostError) -> None:
        """Make the samplers' arguments again, which were lost with a node."""
        self.note(f"a node took along what samplers start with; it is made again ({error})")
        self.deaths += 1
        if self.deaths > self.config.cluster.max_restarts:
            raise error
        self.init, self.current = self._renew_init()

    # more and fewer samplers

    def resize(self, wanted: int) -> str:
        """Have that many samplers; returns what was begun, in words.

        Raises:
            ClusterError: the cluster has no room for so many; nothing has changed.
        """
        if wanted < 1:
            raise ClusterError(f"--samplers {wanted}: wanted at least 1")
        staying = [member for member in self.members if not member.leaving]
        if wanted == len(staying):
            return f"the job has {wanted} {'sampler' if wanted == 1 else 'samplers'} already"
        if wanted > len(staying):
            return self._grow(wanted - len(staying))
        for member in staying[wanted:]:
            member.leaving = True
        self.dismiss_idle()
        return f"{len(staying)} samplers -> {wanted}; those that leave finish the groups they hold"

    def dismiss_idle(self) -> None:
        """Stop members that are leaving and hold no groups."""
        for member in [one for one in self.members if one.leaving and not one.held]:
            self.members.remove(member)
            self.spare.append(member.slot)
            ray.wait([member.actor.stop.remote()], timeout=STOP_TIMEOUT_S)
            ray.kill(member.actor)
            self.note(f"{member.name} has left")

    def _grow(self, more: int) -> str:
        first = 1 + max(member.index for member in self.members)
        slots: list[Slot] = []
        try:
            for index in range(first, first + more):
                slots.append(self.spare.pop() if self.spare else self.placement.another_sampler(index))
        except ClusterError:
            self.spare.extend(slots)
            raise
        for index, slot in enumerate(slots, start=first):
            member = Member(index, slot, self._actor(index, slot), newcomer=True)
            self._join(member)
            self.members.append(member)
        return f"{len(self.members) - more} samplers -> {len(self.members)}; new ones serve once they have attested"

    def _actor(self, index: int, slot: Slot) -> ActorHandle:
        options = ray.remote(SamplerActor).options(max_concurrency=1000, **self.servers.sampler_options(slot))
        return options.remote(self.config, index)


def pending_call(member: Member, ref: ObjectRef, what: str) -> Waiting:
    return Waiting(ref, member.name, what, member.actor)
