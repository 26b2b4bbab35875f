"""Stops the run when an actor has pending work but makes no progress, and names it with the tail of its log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError as RayActorDiedError
from ray.exceptions import GetTimeoutError, RayError

from actors.faults import actor_logs
from actors.faults.actor_calls import as_raised
from actors.faults.actor_logs import Failures
from rlsys.errors import ActorDiedError, RlsysError, StalledError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

SETTLE_S = 2.0  # a wait is this old before its actor is asked for progress
POLL_S = 1.0  # between two progress requests to one actor
DEATH_GRACE_S = 5.0  # after an actor's death, until its calls that are still pending count as failed
BLIND_S = 5.0  # after a pause of the driver this long, it first collects new progress, then judges
FETCH_S = 120.0  # limit for fetching a result that is ready
NO_TIMEOUT_S = 1e9


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One pending result.

    `actor` has a method `progress` that answers during the work (an async actor, or one with a spare thread). Its value
    changes when the work advances. Without an actor the time limit counts from `since`.
    """

    ref: ray.ObjectRef
    who: str  # "sampler 1"
    what: str  # "sampling 8 completions of problems 3, 17, 40"
    actor: ActorHandle | None = None
    since: float = field(default_factory=time.monotonic)
    together: str = ""  # group of ranks that wait for one another: progress of one counts for all of them


@dataclass(slots=True)
class Heartbeat:
    """The last known progress of one actor; times are of time.monotonic()."""

    moved: float = float("-inf")
    value: object = None
    answered: bool = False
    asked: float = float("-inf")
    answer: ray.ObjectRef | None = None  # of the progress request that is pending
    trouble: str = ""
    died: float | None = None


class Watchdog:
    """Limits the time without progress while a stage has pending work. Not thread-safe."""

    def __init__(self, stage: str, limit_s: float, failures: Failures | None = None) -> None:
        self.stage, self.limit_s = stage, limit_s
        self.failures = failures or Failures()
        self._settle_s, self._poll_s = min(SETTLE_S, limit_s / 4), min(POLL_S, limit_s / 4)
        self._heartbeats: dict[str, Heartbeat] = {}
        self._last_check = self._last_resumed = time.monotonic()

    def wait_any(self, waits: Sequence[Waiting], timeout_s: float = NO_TIMEOUT_S) -> list[Waiting]:
        """Wait until at least one result is ready or failed, and return all such waits in the order given (`value`
        gives the result or raises). Empty after `timeout_s`.

        Raises:
            StalledError: a result that is still pending made no progress within the limit.
        """
        assert waits, "nothing to wait for"
        for waiting in waits:
            if waiting.actor is not None:
                self.failures.name(waiting.actor, waiting.who)
        deadline = time.monotonic() + timeout_s
        while True:
            pause = min(self._poll_s, deadline - time.monotonic())
            done = self._done(waits, max(0.0, pause))
            if done:
                return done
            self._look(waits)
            self._judge(waits)
            if time.monotonic() >= deadline:
                return []

    @property
    def _key(self) -> str:
        return f"watchdog.stages.{self.stage}"

    def _done(self, waits: Sequence[Waiting], pause: float) -> list[Waiting]:
        refs = list(dict.fromkeys(waiting.ref for waiting in waits))
        ready, rest = ray.wait(refs, num_returns=1, timeout=pause, fetch_local=False)
        if ready and rest:
            ready = [*ready, *ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]]
        found = set(ready)
        return [waiting for waiting in waits if waiting.ref in found or self._is_dead(waiting)]

    def _is_dead(self, waiting: Waiting) -> bool:
        """Whether the actor is known to be dead although its call is pending. Ray can leave calls pending after it lost
        their node; a progress request then fails earlier."""
        heartbeat = self._heartbeat(waiting)
        return (
            heartbeat is not None and heartbeat.died is not None and time.monotonic() - heartbeat.died > DEATH_GRACE_S
        )

    def _heartbeat(self, waiting: Waiting) -> Heartbeat | None:
        if waiting.actor is None:
            return None
        return self._heartbeats.setdefault(actor_logs.actor_id(waiting.actor), Heartbeat())

    def _look(self, waits: Sequence[Waiting]) -> None:
        """Read the answers to pending progress requests and send new requests. Does not block."""
        now = time.monotonic()
        if now - self._last_check > BLIND_S:
            self._last_resumed = now
        self._last_check = now
        for waiting in waits:
            heartbeat = self._heartbeat(waiting)
            if heartbeat is None or waiting.actor is None or now - waiting.since < self._settle_s:
                continue
            if heartbeat.answer is not None and ray.wait([heartbeat.answer], timeout=0)[0]:
                self._hear(heartbeat, heartbeat.answer)
            if heartbeat.answer is None and heartbeat.died is None and now - heartbeat.asked >= self._poll_s:
                heartbeat.answer, heartbeat.asked = waiting.actor.progress.remote(), now

    def _hear(self, heartbeat: Heartbeat, answer: ray.ObjectRef) -> None:
        now, heartbeat.answer = time.monotonic(), None
        try:
            value = ray.get(answer, timeout=POLL_S)
        except RayActorDiedError:
            heartbeat.died, heartbeat.trouble = now, "it is dead"
        except RayError as error:
            heartbeat.trouble = str(as_raised(error, "progress"))
        else:
            if heartbeat.answered and value != heartbeat.value:
                heartbeat.moved = now
            heartbeat.value, heartbeat.answered, heartbeat.trouble = value, True, ""

    def _moved(self, waiting: Waiting) -> float:
        heartbeat = self._heartbeat(waiting)
        return waiting.since if heartbeat is None else max(waiting.since, heartbeat.moved)

    def _judge(self, waits: Sequence[Waiting]) -> None:
        now = time.monotonic()
        if now - self._last_resumed < min(BLIND_S, self.limit_s):
            return
        moved: dict[str | ray.ObjectRef, float] = {}
        for waiting in waits:
            key = waiting.together or waiting.ref
            moved[key] = max(moved.get(key, float("-inf")), self._moved(waiting))
        stalled = [waiting for waiting in waits if now - moved[waiting.together or waiting.ref] > self.limit_s]
        if stalled:
            raise self._stalled(stalled, waits, now)

    def _stalled(self, stalled: Sequence[Waiting], waits: Sequence[Waiting], now: float) -> StalledError:
        # actors that do not report progress come first: among ranks that wait for one another, these are the cause
        stuck = sorted(stalled, key=lambda waiting: (self._responds(waiting, now), self._moved(waiting)))
        others = [waiting for waiting in waits if waiting not in stalled]
        said = [
            f"{self.stage}: no progress for {self.limit_s:g} s. If the work can take this long without progress, raise "
            f"{self._key} (now {self.limit_s:g})",
            *(f"  waiting for {self._described(waiting, now)}" for waiting in stuck),
            *(f"  also waiting for {self._described(waiting, now)}" for waiting in others),
        ]
        if first := self.failures.first():
            said.append(first)
        if stuck[0].actor is not None:
            said.append(f"log of {stuck[0].who}: {actor_logs.tail(stuck[0].actor)}")
        error = StalledError("\n".join(said))
        self.failures.add(stuck[0].who, error)
        return error

    def _responds(self, waiting: Waiting, now: float) -> bool:
        heartbeat = self._heartbeat(waiting)
        if heartbeat is None:
            return True
        silent = heartbeat.answer is not None and now - heartbeat.asked > 2 * POLL_S
        return heartbeat.answered and not heartbeat.trouble and not silent

    def _described(self, waiting: Waiting, now: float) -> str:
        asked = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - waiting.since)))
        said = f"{waiting.who}: {waiting.what}; since {asked} ({now - waiting.since:.0f} s)"
        heartbeat = self._heartbeat(waiting)
        if heartbeat is None:
            return said
        if heartbeat.trouble:
            return f"{said}; progress is not available: {heartbeat.trouble}"
        if not heartbeat.answered:
            return f"{said}; it has not answered any progress request: it is busy, stuck or not started yet"
        if heartbeat.answer is not None and now - heartbeat.asked > 2 * POLL_S:
            return f"{said}; its last progress was {heartbeat.value}, and later progress requests were not answered"
        return f"{said}; its progress last changed {now - self._moved(waiting):.0f} s ago: {heartbeat.value}"


def value(waiting: Waiting, failures: Failures | None = None, limit_s: float = FETCH_S) -> Any:
    """The result of a wait that `wait_any` returned. An error is raised, and also added to `failures`. Any: a handle's
    methods have no types.

    Raises:
        RlsysError: the error that the actor raised, unchanged.
        ActorDiedError, DataLostError: the actor is dead, or an argument of its call is lost.
        ActorFailedError: the actor raised an error from outside rlsys.
        StalledError: the result is ready but cannot be fetched within the limit.
    """
    failures = failures or Failures()
    try:
        if not ray.wait([waiting.ref], timeout=0, fetch_local=False)[0] and waiting.actor is not None:
            ray.get(waiting.actor.progress.remote(), timeout=DEATH_GRACE_S)  # raises the cause of death of a dead actor
        return ray.get(waiting.ref, timeout=limit_s)
    except GetTimeoutError:
        raised: RlsysError = StalledError(
            f"{waiting.who}: {waiting.what}: the result could not be fetched within {limit_s:g} s; "
            "the node that holds it does not send it"
        )
    except RayError as error:
        raised = _with_file(as_raised(error, waiting.who, failures.names), failures.file)
    failures.add(waiting.who, raised, waiting.actor if isinstance(raised, ActorDiedError) else None)
    raise raised


def _with_file(raised: RlsysError, file: Path | None) -> RlsysError:
    """The error with a reference to `file`, if `file` will hold its traceback."""
    notes = getattr(raised, "__notes__", [])
    if file is None or not notes:
        return raised
    pointing = type(raised)(f"{raised}; full traceback in {file}")
    for note in notes:
        pointing.add_note(note)
    return pointing


def watched(ref: ray.ObjectRef, watchdog: Watchdog, who: str, what: str, actor: ActorHandle | None = None) -> Any:
    """Wait for one result; raises as `Watchdog.wait_any` and `value` do. Any: as `value`."""
    return watched_all([Waiting(ref, who, what, actor)], watchdog)[0]


def watched_all(waits: Sequence[Waiting], watchdog: Watchdog) -> list[Any]:
    """Wait for all results, in the order given; raises the first failure. Any: as `value`."""
    answers: dict[int, object] = {}
    pending = dict(enumerate(waits))
    while pending:
        done = watchdog.wait_any(list(pending.values()))
        for i, waiting in list(pending.items()):
            if waiting in done:
                answers[i] = value(waiting, watchdog.failures)
                del pending[i]
    return [answers[i] for i in range(len(waits))]
