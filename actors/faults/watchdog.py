"""Nothing waits for ever: who has work left and does not move is named, with its log, and the run stops."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError as RayActorDiedError
from ray.exceptions import GetTimeoutError, RayError

from actors.faults import actor_logs
from actors.faults.actor_calls import as_raised
from actors.faults.actor_logs import Failures
from rlsys.errors import ActorDiedError, RlsysError, StalledError

SETTLE_S = 2.0  # a wait shorter than this asks nobody for progress
POLL_S = 1.0  # between two questions for progress to one actor
DEATH_GRACE_S = 5.0  # from an actor's death until its calls that still have not failed are given up
BLIND_S = 5.0  # a driver that did not look for so long (it was stopped, or busy) looks again before it judges
FETCH_S = 120.0  # for an answer that is there to come here
FOR_EVER_S = 1e9


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One answer that is waited for.

    `actor` has a method `progress` that answers while it works (an async actor, or a thread to spare), with a value
    that changes as the work moves. Without an actor the limit counts from `since`.
    """

    ref: ray.ObjectRef
    who: str  # "sampler 1"
    what: str  # "sampling 8 completions of problems 3, 17, 40"
    actor: Any = None
    since: float = field(default_factory=time.monotonic)
    together: str = ""  # of ranks that wait for one another: while one of them moves, all do


@dataclass(slots=True)
class Heartbeat:
    """What is known of one actor's progress."""

    moved: float = float("-inf")
    value: Any = None
    answered: bool = False
    asked: float = float("-inf")
    answer: ray.ObjectRef | None = None  # to a question that is under way
    trouble: str = ""
    died: float | None = None


class Watchdog:
    """Judges one stage by "work remains and nothing moved". Use it from one thread."""

    def __init__(self, stage: str, limit_s: float, failures: Failures | None = None) -> None:
        self.stage, self.limit_s = stage, limit_s
        self.failures = failures or Failures()
        self._settle_s, self._poll_s = min(SETTLE_S, limit_s / 4), min(POLL_S, limit_s / 4)
        self._pulses: dict[str, Heartbeat] = {}
        self._looked = self._awake = time.monotonic()

    def wait_any(self, waits: Sequence[Waiting], timeout_s: float = FOR_EVER_S) -> list[Waiting]:
        """Those that have an answer or have failed (ask `value`), in the order given; none after `timeout_s`.

        Raises:
            StalledError: one of the others has not moved for the limit.
        """
        assert waits, "nothing to wait for"
        for one in waits:
            if one.actor is not None:
                self.failures.name(one.actor, one.who)
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
        return f"watchdog.{self.stage}_s"

    def _done(self, waits: Sequence[Waiting], pause: float) -> list[Waiting]:
        refs = list(dict.fromkeys(one.ref for one in waits))
        ready, rest = ray.wait(refs, num_returns=1, timeout=pause, fetch_local=False)
        if ready and rest:
            ready = [*ready, *ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]]
        found = set(ready)
        return [one for one in waits if one.ref in found or self._is_dead(one)]

    def _is_dead(self, waiting: Waiting) -> bool:
        """Ray leaves calls pending whose node it lost without seeing it go; then progress tells first."""
        pulse = self._pulse(waiting)
        return pulse is not None and pulse.died is not None and time.monotonic() - pulse.died > DEATH_GRACE_S

    def _pulse(self, waiting: Waiting) -> Heartbeat | None:
        if waiting.actor is None:
            return None
        return self._pulses.setdefault(actor_logs.actor_id(waiting.actor), Heartbeat())

    def _look(self, waits: Sequence[Waiting]) -> None:
        """Take in the answers to the last questions for progress, and put new ones; waits for nothing."""
        now = time.monotonic()
        if now - self._looked > BLIND_S:
            self._awake = now
        self._looked = now
        for one in waits:
            pulse = self._pulse(one)
            if pulse is None or now - one.since < self._settle_s:
                continue
            if pulse.answer is not None and ray.wait([pulse.answer], timeout=0)[0]:
                self._hear(pulse, pulse.answer)
            if pulse.answer is None and pulse.died is None and now - pulse.asked >= self._poll_s:
                pulse.answer, pulse.asked = one.actor.progress.remote(), now

    def _hear(self, pulse: Heartbeat, answer: ray.ObjectRef) -> None:
        now, pulse.answer = time.monotonic(), None
        try:
            value = ray.get(answer, timeout=POLL_S)
        except RayActorDiedError:
            pulse.died, pulse.trouble = now, "it is dead"
        except RayError as error:
            pulse.trouble = str(as_raised(error, "progress"))
        else:
            if pulse.answered and value != pulse.value:
                pulse.moved = now
            pulse.value, pulse.answered, pulse.trouble = value, True, ""

    def _moved(self, waiting: Waiting) -> float:
        pulse = self._pulse(waiting)
        return waiting.since if pulse is None else max(waiting.since, pulse.moved)

    def _judge(self, waits: Sequence[Waiting]) -> None:
        now = time.monotonic()
        if now - self._awake < min(BLIND_S, self.limit_s):
            return
        moved: dict[Any, float] = {}
        for one in waits:
            key = one.together or one.ref
            moved[key] = max(moved.get(key, float("-inf")), self._moved(one))
        stalled = [one for one in waits if now - moved[one.together or one.ref] > self.limit_s]
        if stalled:
            raise self._stalled(stalled, waits, now)

    def _stalled(self, stalled: Sequence[Waiting], waits: Sequence[Waiting], now: float) -> StalledError:
        # first those that do not even say how far they are: of ranks that wait for one another, it is them
        stuck = sorted(stalled, key=lambda one: (self._responds(one, now), self._moved(one)))
        others = [one for one in waits if one not in stalled]
        said = [
            f"{self.stage}: nothing moved for {self.limit_s:g} s. If the work may take this long without a sign of "
            f"life, raise {self._key} (now {self.limit_s:g})",
            *(f"  waiting for {self._described(one, now)}" for one in stuck),
            *(f"  also waiting for {self._described(one, now)}" for one in others),
        ]
        if first := self.failures.first():
            said.append(first)
        if stuck[0].actor is not None:
            said.append(f"log of {stuck[0].who}: {actor_logs.tail(stuck[0].actor)}")
        error = StalledError("\n".join(said))
        self.failures.add(stuck[0].who, error)
        return error

    def _responds(self, one: Waiting, now: float) -> bool:
        pulse = self._pulse(one)
        if pulse is None:
            return True
        silent = pulse.answer is not None and now - pulse.asked > 2 * POLL_S
        return pulse.answered and not pulse.trouble and not silent

    def _described(self, one: Waiting, now: float) -> str:
        asked = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - one.since)))
        said = f"{one.who}: {one.what}; since {asked} ({now - one.since:.0f} s)"
        pulse = self._pulse(one)
        if pulse is None:
            return said
        if pulse.trouble:
            return f"{said}; no progress to be had: {pulse.trouble}"
        if not pulse.answered:
            return f"{said}; it has answered no question for its progress: it is busy or stuck, or has not started"
        if pulse.answer is not None and now - pulse.asked > 2 * POLL_S:
            return f"{said}; its progress was {pulse.value}, and it has answered no question since"
        return f"{said}; its progress last changed {now - self._moved(one):.0f} s ago: {pulse.value}"


def value(waiting: Waiting, failures: Failures | None = None, limit_s: float = FETCH_S) -> Any:
    """The answer of one that `wait_any` has returned; what went wrong instead is also added to `failures`.

    Raises:
        RlsysError: the one that the actor raised, as it raised it.
        ActorDiedError, DataLostError: it is gone, or what it needed is.
        ActorFailedError: it raised an error from outside rlsys.
        StalledError: the answer is there but cannot be fetched within the limit.
    """
    failures = failures or Failures()
    try:
        if not ray.wait([waiting.ref], timeout=0, fetch_local=False)[0] and waiting.actor is not None:
            ray.get(waiting.actor.progress.remote(), timeout=DEATH_GRACE_S)  # of a dead actor: raises what it died of
        return ray.get(waiting.ref, timeout=limit_s)
    except GetTimeoutError:
        raised: RlsysError = StalledError(
            f"{waiting.who}: {waiting.what}: the answer could not be fetched within {limit_s:g} s; "
            "the node that holds it does not send it"
        )
    except RayError as error:
        raised = _with_file(as_raised(error, waiting.who, failures.names), failures.file)
    failures.add(waiting.who, raised, waiting.actor if isinstance(raised, ActorDiedError) else None)
    raise raised


def _with_file(raised: RlsysError, file: Path | None) -> RlsysError:
    """The error with the file that will hold its traceback, if it has one and there is one."""
    notes = getattr(raised, "__notes__", [])
    if file is None or not notes:
        return raised
    named = type(raised)(f"{raised}; whole traceback in {file}")
    for note in notes:
        named.add_note(note)
    return named


def watched(ref: ray.ObjectRef, watchdog: Watchdog, who: str, what: str, actor: Any = None) -> Any:
    """One answer; raises as `Watchdog.wait_any` and `value` do."""
    return watched_all([Waiting(ref, who, what, actor)], watchdog)[0]


def watched_all(waits: Sequence[Waiting], watchdog: Watchdog) -> list[Any]:
    """All answers in the order given; the first to fail is the one that is raised."""
    answers: dict[int, Any] = {}
    pending = dict(enumerate(waits))
    while pending:
        done = watchdog.wait_any(list(pending.values()))
        for i, one in list(pending.items()):
            if one in done:
                answers[i] = value(one, watchdog.failures)
                del pending[i]
    return [answers[i] for i in range(len(waits))]
