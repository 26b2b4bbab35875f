"""Samplers as one stage: whole groups go to the one with least work; who dies is replaced, and its groups drawn again.

A member serves only once it has attested the current version. The pool is tended from the one thread in which the loop
waits here: nothing happens behind its back.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from actors.cluster.column_refs import by_reference
from actors.cluster.placement import Placement, Slot
from actors.faults.actor_logs import Failures
from actors.faults.watchdog import Waiting, Watchdog, value
from actors.sampler_actor import SamplerActor
from rlsys.config import JobConfig
from rlsys.data.problems import occurrences
from rlsys.errors import ActorDiedError, ClusterError, DataLostError, RlsysError, StalledError, WeightSyncError
from rlsys.metrics import Metrics
from rlsys.protocols import BatchRef, PublishedAdapter
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.update import Attestation

POLL_S = 0.5
STOP_TIMEOUT_S = 5.0  # for an engine to end by itself before its actor is killed
CHUNKS_PER_SAMPLER = (
    4  # calls per sampler and step where there are several: fine enough to even out, coarse enough to be cheap
)
AHEAD = 2  # times max_num_seqs completions wait at a sampler, so that its engine is never short of work
# Where the learner learns meanwhile, an engine has no more than it can run, in calls of this share of it: what has not
# begun starts on newer weights, and a version that is loaded does not wait behind a queue for its proof.
FINE = 16
LOAD_POLL_S = 0.01
NAMED = 8  # problems in a message


@dataclass(frozen=True, slots=True)
class SamplerInit:
    """What a sampler is started with: references, which every later one gets too."""

    base: Any
    train: Any
    held_out: Any
    probe: Any


@dataclass(frozen=True, slots=True)
class GroupChunk:
    """Groups of one call."""

    problems: Array  # (P,)
    occurrence: Array  # (P,) of each problem among all that were drawn under the task's seed

    def __len__(self) -> int:
        return len(self.problems)


@dataclass(eq=False)
class SampleRequest:
    """Groups that somebody waits for, cut into units that samplers are called with."""

    split: str
    n: int
    params: SamplingParams
    chunks: list[GroupChunk]
    queue: deque[int]  # units that no sampler has
    rollouts: list[Any]  # by unit
    counts: list[dict[str, float]]
    left: int  # units without an answer
    resampled_groups: int = 0  # groups that were sampled once more


@dataclass(eq=False)
class InFlight:
    """A unit at a sampler."""

    member: Member
    request: SampleRequest
    chunk: int


@dataclass(eq=False)
class Member:
    """One sampler of the pool, whichever process serves as it at the moment."""

    index: int
    slot: Slot
    actor: Any
    joining: Waiting | None = None  # until this is done it gets no work
    unproven: bool = False
    newcomer: bool = False  # came by `resize` and has not served yet: the job can do without it
    held: int = 0  # completions in its hands
    version: int = -1  # that it has attested last
    leaving: bool = False

    @property
    def name(self) -> str:
        return f"sampler {self.index}"

    @property
    def serves(self) -> bool:
        return self.joining is None and not self.leaving


class SamplerPool:
    """The loop's ``Samplers``.

    ``renew``: makes anew what samplers are started with and the current version, where a node took them with it; it
    raises Rewound where the learner had to come back for that. ``between``: hears requests from outside.
    ``resampled``: told the (P,) problems for training that are drawn completions for once more.
    """

    def __init__(
        self, config: JobConfig, placement: Placement, failures: Failures, note: Callable[[str], None]
    ) -> None:
        self.config, self.placement, self.failures, self.note = config, placement, failures, note
        self.members: list[Member] = []
        self.spare: list[Slot] = []
        self.init: SamplerInit | None = None
        self.current: PublishedAdapter | None = None
        self.deaths = 0  # since the last version that was loaded
        self.asleep = False
        self.requests: dict[int, SampleRequest] = {}  # by ticket, in the order in which they are dealt
        self.in_flight: dict[Waiting, InFlight] = {}
        self.finished: dict[int, BatchRef] = {}
        self._tickets = itertools.count()
        self._dog = Watchdog("sample", config.watchdog.sample_s, failures)
        self.renew: Callable[[], tuple[SamplerInit, PublishedAdapter]]
        self.between: Callable[[], None] = lambda: None
        self.resampled: Callable[[Array], None] = lambda ids: None
        self._starts = Watchdog("start", config.watchdog.start_s, failures)

    # the job's beginning and end

    def launch(self, slots: Sequence[Slot]) -> None:
        """Make the actors; they import vLLM while the base is being made."""
        self.members = [Member(i, slot, self._actor(i, slot)) for i, slot in enumerate(slots)]
        for member in self.members:
            member.actor.preload.remote()

    def begin(self, base: Any, train: Any, held_out: Any) -> None:
        """Start every engine; `start` waits for them. The learner loads its base at the same time, unless they share a
        GPU."""
        for member in self.members:
            member.joining = self._joining(member, member.actor.start.remote(base, train, held_out), "starting vLLM")
            member.unproven = True

    def start(self, init: SamplerInit) -> None:
        """Have every engine prove that adapters reach its forward pass."""
        self.init = init
        while any(member.joining for member in self.members):
            self._wait_for_joining()

    def close(self) -> None:
        """End every engine, then every actor."""
        stopping = [member.actor.stop.remote() for member in self.members]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S) if stopping else None
        for member in self.members:
            ray.kill(member.actor)
        self.members = []

    # the loop's stages

    @property
    def version(self) -> int:
        assert self.current is not None
        return self.current.version

    def sample(
        self, split: str, problems: Array, n: int, params: SamplingParams, occurrence: Array | None = None
    ) -> BatchRef:
        ticket = self.submit(split, problems, n, params, occurrence, urgent=True)
        try:
            while ticket in self.requests:
                self._advance(POLL_S)
        finally:
            self.requests.pop(ticket, None)  # after an error nobody waits for it
        made = self.finished.pop(ticket)
        if self._shares_gpus:
            self._all("sleep", "giving the GPU's memory to the learner")
            self.asleep = True
        return made

    def submit(
        self,
        split: str,
        problems: Array,
        n: int,
        params: SamplingParams,
        occurrence: Array | None = None,
        urgent: bool = False,
    ) -> int:
        """`urgent`: before what no sampler has begun yet."""
        self._wake()
        chunks = self._chunks(problems, occurrences(problems) if occurrence is None else occurrence, n)
        request = SampleRequest(
            split, n, params, chunks, deque(range(len(chunks))), [None] * len(chunks), [{}] * len(chunks), len(chunks)
        )
        ticket = next(self._tickets)
        self.requests = {ticket: request, **self.requests} if urgent else {**self.requests, ticket: request}
        if not self.in_flight:
            self._dog = Watchdog("sample", self.config.watchdog.sample_s, self.failures)
        self.tend()
        self._dispatch()
        return ticket

    def collect(self, timeout_s: float) -> list[tuple[int, BatchRef]]:
        if not self.finished:
            self._advance(timeout_s)
        done = list(self.finished.items())
        self.finished.clear()
        return done

    def forget(self) -> None:
        for request in self.requests.values():
            request.queue.clear()
        self.requests, self.finished = {}, {}

    def _advance(self, timeout_s: float) -> None:
        """Deal what is waiting, and take in what has landed, waiting for it up to the timeout."""
        self.tend()
        self._dispatch()
        if self.in_flight:
            for waiting in self._dog.wait_any(list(self.in_flight), timeout_s):
                if waiting in self.in_flight:  # else lost with its sampler a moment ago
                    self._collect(waiting)
            self._dispatch()
        elif any(request.queue for request in self.requests.values()):
            self._wait_for_joining()
        else:
            time.sleep(timeout_s)
        for ticket, request in list(self.requests.items()):
            if not request.left:
                del self.requests[ticket]
                self.finished[ticket] = _batch_of(request, sum(member.serves for member in self.members))

    def _collect(self, waiting: Waiting) -> None:
        """Take a call's answer."""
        call = self.in_flight[waiting]
        request, chunk = call.request, call.chunk
        is_wanted = any(request is other for other in self.requests.values())
        try:
            counts = value(waiting, self.failures)
        except ActorDiedError as error:
            self._replace(call.member, error)
            return
        except RlsysError:
            if is_wanted:
                raise
            counts = {}  # a learner that went back took its versions out, and what ran on them is of no use to anybody
        del self.in_flight[waiting]
        call.member.held -= len(request.chunks[chunk]) * request.n
        request.counts[chunk] = counts
        request.left -= 1

    def _requeue(self, member: Member) -> None:
        """All that a dead sampler held goes to the front again."""
        lost = [waiting for waiting, call in self.in_flight.items() if call.member is member]
        flights = [self.in_flight.pop(waiting) for waiting in lost]
        for call in sorted(flights, key=lambda one: one.chunk, reverse=True):
            problems = call.request.chunks[call.chunk].problems
            if any(call.request is request for request in self.requests.values()):
                call.request.queue.appendleft(call.chunk)
                call.request.resampled_groups += len(problems)
                if call.request.split == "train":
                    self.resampled(problems)

    def load(self, update: PublishedAdapter) -> Metrics:
        if self._is_current(update.version, update.digest):
            return {"sync/bytes": 0.0}  # every group agreed, so the optimizer did not step: the samplers have this one
        self._wake()
        reload = self.current is not None and update.version <= self.current.version
        self.current = update
        dog = Watchdog("sync", self.config.watchdog.sync_s, self.failures)
        asked = {self._loading(member, reload): member for member in self.members if member.serves}
        found: list[Attestation] = []
        while asked:
            if self.in_flight:
                self._advance(LOAD_POLL_S)  # the others go on, each on what it has attested
            for waiting in dog.wait_any(list(asked), 0.0 if self.in_flight else POLL_S):
                member = asked.pop(waiting)
                try:
                    found.append(value(waiting, self.failures))
                except ActorDiedError as error:
                    if member.joining is None:  # else it has been replaced already
                        self._replace(member, error)
                except DataLostError as error:
                    self._renew(error)
                    update = self.current  # the learner may have gone on, or back, meanwhile
                    asked = {
                        self._loading(other, update.version <= other.version): other
                        for other in self.members
                        if other.serves and other.version != update.version
                    }
                    break
                else:
                    refuse_unattested(found[-1], member.name, update, self.config.run.name)
                    member.version = update.version
        while not any(member.serves for member in self.members):
            self._wait_for_joining()
        self.deaths = 0
        return {
            "sync/canary_new": max((one.distance_new for one in found), default=0.0),
            "sync/canary_previous": min((one.distance_previous for one in found), default=0.0),
            "sync/separation": max((one.separation for one in found), default=0.0),
            "sync/no_power": float(sum(not one.has_power for one in found)),
            "sync/bytes": float(update.nbytes),
        }

    # coming and going

    def tend(self) -> None:
        """Take in who has finished joining, and hear requests from outside."""
        self.between()
        joining = {member.joining: member for member in self.members if member.joining}
        if not joining:
            return
        # Not the watchdog's: while others work, nobody has to wait for who is still on the way.
        ready = ray.wait([waiting.ref for waiting in joining], num_returns=len(joining), timeout=0)[0]
        for waiting, member in joining.items():
            if waiting.ref in ready:
                self._joined(member)

    def resize(self, wanted: int) -> str:
        """Have that many samplers; returns what was begun, in words.

        Raises:
            ClusterError: there is no room for so many; nothing has changed then.
        """
        if wanted < 1:
            raise ClusterError(f"--samplers {wanted}: wanted at least 1")
        staying = [member for member in self.members if not member.leaving]
        if wanted == len(staying):
            return f"there are {wanted} samplers already"
        if wanted > len(staying):
            return self._grow(wanted - len(staying))
        for member in staying[wanted:]:
            member.leaving = True
        self._dismiss_idle()
        return f"{len(staying)} samplers -> {wanted}; those that leave finish the groups they hold"

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

    def _dismiss_idle(self) -> None:
        for member in [one for one in self.members if one.leaving and not one.held]:
            self.members.remove(member)
            self.spare.append(member.slot)
            ray.wait([member.actor.stop.remote()], timeout=STOP_TIMEOUT_S)
            ray.kill(member.actor)
            self.note(f"{member.name} has left")

    def _replace(self, member: Member, error: RlsysError) -> None:
        """Another process in the place of a member that died, unless too many did.

        Raises:
            ActorDiedError: the first death, when more than cluster.max_restarts came without a version in between.
        """
        ray.kill(member.actor)  # its engine may be dead and the actor not
        member.held = 0
        self._requeue(member)
        if member.leaving or member.newcomer:
            self.members.remove(member)
            self.spare.append(member.slot)
            if member.newcomer:
                self.note(f"{member.name} could not join, the job goes on without it: {str(error).splitlines()[0]}")
            return
        self.deaths += 1
        limit = self.config.cluster.max_restarts
        if self.deaths > limit:
            raise self.failures.gone(f"samplers died {self.deaths} times without a step in between", limit)
        self.note(f"{member.name} died and is replaced ({self.deaths} of {limit}): {str(error).splitlines()[0]}")
        member.actor = self._actor(member.index, member.slot)
        self._join(member)

    def _renew(self, error: DataLostError) -> None:
        self.note(f"made anew, since a node took it along: what samplers are started with ({error})")
        self.deaths += 1
        if self.deaths > self.config.cluster.max_restarts:
            raise error
        self.init, self.current = self.renew()

    def _join(self, member: Member) -> None:
        member.unproven = False  # `replace` has it prove itself
        update = None if self.current is None else self.current.ref
        ref = member.actor.replace.remote(*self._arguments(), update, self.config.checks.max_canary_diff)
        member.joining = self._joining(member, ref, "starting vLLM and loading the current version")

    def _joined(self, member: Member) -> None:
        """One stage of joining is done: serve, or catch up with the version that came out meanwhile."""
        assert member.joining is not None and self.init is not None
        try:
            attested: Attestation | None = value(member.joining, self.failures)
        except ActorDiedError as error:
            self._replace(member, error)
            return
        except DataLostError as error:
            self._renew(error)
            self._join(member)
            return
        except RlsysError as error:
            if not member.newcomer:
                raise
            self._replace(member, error)
            return
        if member.unproven:
            member.unproven = False
            ref = member.actor.prove.remote(self.init.probe, self.config.checks.max_canary_diff)
            member.joining = self._joining(member, ref, "proving that adapters reach its forward pass")
            return
        if self.current is None or (attested and self._is_current(attested.version, attested.digest)):
            member.joining, member.newcomer = None, False
            if self.current is not None:
                member.version = self.current.version
                self.note(f"{member.name} serves version {self.current.version}")
            return
        ref = member.actor.load.remote(self.current.ref, self.config.checks.max_canary_diff, True)
        member.joining = self._joining(member, ref, f"loading version {self.current.version}")

    def _wait_for_joining(self) -> None:
        """Nobody can work: wait for who is on the way, but not for a place that nobody can give."""
        joining = {member.joining: member for member in self.members if member.joining}
        if not joining:
            raise StalledError("no sampler is left, and none is on its way")
        self.between()
        for waiting in self._starts.wait_any(list(joining), POLL_S):
            self._joined(joining[waiting])
        for waiting, member in joining.items():
            waited = time.monotonic() - waiting.since
            lacking = self.placement.lacking(member.slot) if waited > POLL_S and member.joining is waiting else None
            if lacking and waited > self.config.watchdog.sample_s:
                raise StalledError(
                    f"sample: no sampler is left, and {member.name} has waited {waited:.0f} s (watchdog.sample_s) for "
                    f"a place: {lacking}. {self.failures.first()}"
                )

    # GPUs that are shared with the learner: who works has the memory (not run on a GPU yet)

    @property
    def _shares_gpus(self) -> bool:
        return self.config.sampler.colocate and self.config.sampler_device == "cuda"

    def _wake(self) -> None:
        if self.asleep:
            self._all("wake", "taking the GPU's memory back")
            self.asleep = False

    def _all(self, method: str, what: str) -> None:
        dog = Watchdog("sync", self.config.watchdog.sync_s, self.failures)
        asked = {
            Waiting(getattr(member.actor, method).remote(), member.name, what, member.actor): member
            for member in self.members
            if member.serves
        }
        while asked:
            for waiting in dog.wait_any(list(asked), POLL_S):
                member = asked.pop(waiting)
                try:
                    value(waiting, self.failures)
                except ActorDiedError as error:
                    self._replace(member, error)

    # small parts

    def _actor(self, index: int, slot: Slot) -> Any:
        options = ray.remote(SamplerActor).options(max_concurrency=1000, **by_reference(slot.ray_options()))
        return options.remote(self.config, index)

    def _arguments(self) -> tuple[Any, ...]:
        assert self.init is not None
        return self.init.base, self.init.train, self.init.held_out, self.init.probe

    def _joining(self, member: Member, ref: Any, what: str) -> Waiting:
        return Waiting(ref, member.name, what, member.actor)

    def _loading(self, member: Member, reload: bool) -> Waiting:
        assert self.current is not None
        ref = member.actor.load.remote(self.current.ref, self.config.checks.max_canary_diff, reload)
        return self._joining(member, ref, f"loading version {self.current.version}")

    def _is_current(self, version: int, digest: str) -> bool:
        return self.current is not None and (self.current.version, self.current.digest) == (version, digest)

    def _chunks(self, problems: Array, occurrence: Array, n: int) -> list[GroupChunk]:
        """Problems in the order given, cut into calls."""
        pieces = -(-len(problems) // max(1, self._max_held // n))
        if self._overlapped:
            pieces = -(-len(problems) // max(1, self.config.sampler.max_num_seqs // FINE // n))
        elif len(self.members) > 1:
            pieces = max(pieces, min(len(problems), CHUNKS_PER_SAMPLER * len(self.members)))
        shares = zip(np.array_split(problems, pieces), np.array_split(occurrence, pieces), strict=True)
        return [GroupChunk(*share) for share in shares if len(share[0])]

    @property
    def _overlapped(self) -> bool:
        return self.config.overlap.max_policy_lag is not None

    @property
    def _max_held(self) -> int:
        """Completions that a sampler may hold."""
        return (1 if self._overlapped else AHEAD) * self.config.sampler.max_num_seqs

    def _dispatch(self) -> None:
        """Hand out what fits, always to the member with least work."""
        able = [(member.held, i) for i, member in enumerate(self.members) if member.serves]
        heapq.heapify(able)
        for request in self.requests.values():
            while request.queue and able:
                held, i = able[0]
                more = len(request.chunks[request.queue[0]]) * request.n
                if held and held + more > self._max_held:
                    break
                self._assign(request, request.queue.popleft(), self.members[i])
                heapq.heapreplace(able, (held + more, i))
        self._dismiss_idle()

    def _assign(self, request: SampleRequest, chunk: int, member: Member) -> None:
        groups = request.chunks[chunk]
        request.rollouts[chunk], counts = member.actor.sample.remote(
            request.split, groups.problems, groups.occurrence, request.n, request.params, member.version
        )
        member.held += len(groups) * request.n
        what = f"sampling {request.n} completions of {_format_problems(groups.problems)}"
        self.in_flight[Waiting(counts, member.name, what, member.actor)] = InFlight(member, request, chunk)


def _batch_of(request: SampleRequest, workers: int) -> BatchRef:
    total = {key: sum(part[key] for part in request.counts) for key in request.counts[0]}
    completions = total["completions"]
    metrics = {
        "sampler/completions": completions,
        "sampler/completion_tokens": total["tokens"],
        "sampler/completion_tokens_mean": total["tokens"] / completions,
        "sampler/truncated_share": total["truncated"] / completions,
        "sampler/workers": float(workers),
        "sampler/resampled_groups": float(request.resampled_groups),
    }
    if "turns" in total:
        metrics["sampler/turns_mean"] = total["turns"] / completions
        metrics |= {f"sampler/{key}": total[key] for key in ("reply_timeouts", "reply_errors", "out_of_turns")}
    return BatchRef(tuple(request.rollouts), metrics)


def _format_problems(problems: Array) -> str:
    shown = ", ".join(str(problem) for problem in problems[:NAMED])
    more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return f"problem{'s' if len(problems) > 1 else ''} {shown}{more}"


def refuse_unattested(found: Attestation, name: str, update: PublishedAdapter, run_id: str) -> None:
    """A sampler must have answered for this version and hold the bits that the learner published.

    Raises:
        WeightSyncError: it does not.
    """
    if (found.run_id, found.version, found.digest) != (run_id, update.version, update.digest):
        raise WeightSyncError(
            f"{name} serves version {found.version} of {found.run_id!r} with hash {found.digest}; wanted version "
            f"{update.version} of {run_id!r} with hash {update.digest}. It missed a weight sync, so its "
            "completions would come from other weights than the learner's; the run stops here"
        )
