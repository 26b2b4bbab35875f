"""Dispatch of groups to samplers: each chunk of groups goes to the member with the fewest completions in hand."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from actors.faults.actor_logs import Failures
from actors.faults.watchdog import Waiting, Watchdog, value
from actors.hosting.sampler_body import SampleRequest
from actors.stages.sampler_pool.membership import Member, Membership, pending_call
from rlsys.config import OverlapSection, SamplerSection, WatchdogSection
from rlsys.errors import ActorDiedError, RlsysError
from rlsys.protocols import Ref, RolloutsRef
from rlsys.rollouts import Rollouts
from rlsys.types import Array, SamplingParams

# Calls per sampler and step where there are several: small enough to balance the load, large enough to be cheap.
CHUNKS_PER_SAMPLER = 4
AHEAD = 2  # times max_num_seqs completions wait at a sampler, so that its engine is never short of work
# In the overlapped loop an engine gets no more than it can run, in calls of this share of it: groups that have not
# started start on newer weights, and a version that is loaded does not wait behind a queue for its attestation.
FINE = 16
NAMED = 8  # problems in a message


@dataclass(frozen=True, slots=True)
class GroupChunk:
    """Groups of one call."""

    problems: Array  # (P,)
    occurrence: Array  # (P,) of each problem among all that are sampled under the seed

    def __len__(self) -> int:
        return len(self.problems)


@dataclass(eq=False)
class PendingBatch:
    """Groups of one ticket, cut into chunks."""

    split: str
    n: int
    params: SamplingParams
    chunks: list[GroupChunk]
    queue: deque[int]  # chunks that no sampler has
    rollouts: list[Ref[Rollouts] | None]  # by chunk; None: never dispatched
    counts: list[dict[str, float]]
    unanswered: int  # chunks
    resampled_groups: int = 0


@dataclass(frozen=True, slots=True)
class InFlight:
    """A chunk at a sampler."""

    member: Member
    batch: PendingBatch
    chunk: int


class Dispatcher:
    """`resampled`: called with the (P,) training problems whose groups are sampled again."""

    def __init__(
        self,
        sampler: SamplerSection,
        overlap: OverlapSection,
        watchdog: WatchdogSection,
        failures: Failures,
        membership: Membership,
        resampled: Callable[[Array], None],
    ) -> None:
        self.sampler, self.overlap, self.watchdog = sampler, overlap, watchdog
        self.failures, self.membership, self.resampled = failures, membership, resampled
        self.batches: dict[int, PendingBatch] = {}  # by ticket, in the order of dispatch
        self.in_flight: dict[Waiting, InFlight] = {}
        self.finished: dict[int, RolloutsRef] = {}
        self._tickets = itertools.count()
        self._dog = Watchdog("sample", watchdog.limit_of("sample"), failures)

    def add(
        self, split: str, problems: Array, occurrence: Array, n: int, params: SamplingParams, urgent: bool = False
    ) -> int:
        """A ticket. `urgent`: before groups that no sampler has begun yet."""
        chunks = self._chunks(problems, occurrence, n)
        count = len(chunks)
        batch = PendingBatch(split, n, params, chunks, deque(range(count)), [None] * count, [{}] * count, count)
        ticket = next(self._tickets)
        self.batches = {ticket: batch, **self.batches} if urgent else {**self.batches, ticket: batch}
        if not self.in_flight:
            self._dog = Watchdog("sample", self.watchdog.limit_of("sample"), self.failures)
        return ticket

    def forget(self) -> None:
        for batch in self.batches.values():
            batch.queue.clear()
        self.batches, self.finished = {}, {}

    @property
    def has_queued(self) -> bool:
        return any(batch.queue for batch in self.batches.values())

    def dispatch(self) -> None:
        """Send chunks to the samplers up to their limits."""
        members = self.membership.members
        able = [(member.held, i) for i, member in enumerate(members) if member.serves]
        heapq.heapify(able)
        for batch in self.batches.values():
            while batch.queue and able:
                held, i = able[0]
                more = len(batch.chunks[batch.queue[0]]) * batch.n
                if held and held + more > self._max_held:
                    break
                self._assign(batch, batch.queue.popleft(), members[i])
                heapq.heapreplace(able, (held + more, i))
        self.membership.dismiss_idle()

    def receive(self, timeout_s: float) -> None:
        """Take the answers that have arrived; wait for the first one up to the timeout."""
        for waiting in self._dog.wait_any(list(self.in_flight), timeout_s):
            if waiting in self.in_flight:  # else its sampler has died in this loop
                self._receive(waiting)

    def finish(self) -> None:
        """Move batches whose chunks are all answered to `finished`."""
        for ticket, batch in list(self.batches.items()):
            if not batch.unanswered:
                del self.batches[ticket]
                self.finished[ticket] = _rollouts_of(batch, len(self.membership.serving))

    def requeue(self, member: Member) -> None:
        """Put the chunks of a dead sampler at the front of their queues."""
        lost = [waiting for waiting, call in self.in_flight.items() if call.member is member]
        calls = [self.in_flight.pop(waiting) for waiting in lost]
        for call in sorted(calls, key=lambda call: call.chunk, reverse=True):
            batch, problems = call.batch, call.batch.chunks[call.chunk].problems
            if self._is_wanted(batch):
                batch.queue.appendleft(call.chunk)
                batch.resampled_groups += len(problems)
                if batch.split == "train":
                    self.resampled(problems)

    def _assign(self, batch: PendingBatch, chunk: int, member: Member) -> None:
        groups = batch.chunks[chunk]
        request = SampleRequest(batch.split, groups.problems, groups.occurrence, batch.n, batch.params, member.version)
        rollouts, counts = member.actor.sample.remote(request)
        batch.rollouts[chunk] = Ref(rollouts)
        member.held += len(groups) * batch.n
        what = f"sampling {batch.n} completions of {_format_problems(groups.problems)}"
        self.in_flight[pending_call(member, counts, what)] = InFlight(member, batch, chunk)

    def _receive(self, waiting: Waiting) -> None:
        call = self.in_flight[waiting]
        batch, chunk = call.batch, call.chunk
        try:
            counts = value(waiting, self.failures)
        except ActorDiedError as error:
            self.membership.replace(call.member, error)
            return
        except RlsysError:
            if self._is_wanted(batch):
                raise
            counts = {}  # a rollback of the learner unloaded the version that this call ran on
        del self.in_flight[waiting]
        call.member.held -= len(batch.chunks[chunk]) * batch.n
        batch.counts[chunk] = counts
        batch.unanswered -= 1

    def _is_wanted(self, batch: PendingBatch) -> bool:
        """Whether the loop still waits for it."""
        return any(batch is other for other in self.batches.values())

    def _chunks(self, problems: Array, occurrence: Array, n: int) -> list[GroupChunk]:
        """Problems in the order given, cut into calls."""
        count = -(-len(problems) // max(1, self._max_held // n))
        if self._overlapped:
            count = -(-len(problems) // max(1, self.sampler.max_num_seqs // FINE // n))
        elif len(self.membership.members) > 1:
            count = max(count, min(len(problems), CHUNKS_PER_SAMPLER * len(self.membership.members)))
        shares = zip(np.array_split(problems, count), np.array_split(occurrence, count), strict=True)
        return [GroupChunk(*share) for share in shares if len(share[0])]

    @property
    def _overlapped(self) -> bool:
        return self.overlap.max_policy_lag is not None

    @property
    def _max_held(self) -> int:
        """Completions that a sampler may hold."""
        return (1 if self._overlapped else AHEAD) * self.sampler.max_num_seqs


def _rollouts_of(batch: PendingBatch, workers: int) -> RolloutsRef:
    total = {key: sum(part[key] for part in batch.counts) for key in batch.counts[0]}
    completions = total["completions"]
    metrics = {
        "sampler/completions": completions,
        "sampler/completion_tokens": total["tokens"],
        "sampler/completion_tokens_mean": total["tokens"] / completions,
        "sampler/truncated_share": total["truncated"] / completions,
        "sampler/workers": float(workers),
        "sampler/resampled_groups": float(batch.resampled_groups),
    }
    if "turns" in total:
        metrics["sampler/turns_mean"] = total["turns"] / completions
        metrics |= {f"sampler/{key}": total[key] for key in ("reply_timeouts", "reply_errors", "out_of_turns")}
    refs = tuple(ref for ref in batch.rollouts if ref is not None)
    assert len(refs) == len(batch.chunks)
    return RolloutsRef(refs, metrics)


def _format_problems(problems: Array) -> str:
    shown = ", ".join(str(problem) for problem in problems[:NAMED])
    more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return f"problem{'s' if len(problems) > 1 else ''} {shown}{more}"
