"""Notices dead actors of a deployment and replaces them, on the side of one client.

Each client supervises the deployments that it uses. It asks every actor all CHECK_S whether it works, and a call that
fails with the death of its actor is a sign as well. Then the client that started the deployment starts another actor;
for a detached deployment any client does. Actors have names in Ray, so of several clients that do this at once, one
starts the actor and the others find it. An actor brings itself up when the first client asks it to: a learner loads
the base, a sampler starts its engine and proves its adapters to the learner's probe before it serves.

Every client gives a new sampler the snapshots that it holds. The runs of a dead learner are lost.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.cluster.connection import LEFT, connection, kept
from actors.service.call_futures import future_of
from actors.service.fork_servers import DeploymentServers
from actors.service.launch import another, find, launch_learner, launch_sampler, learner_name, sampler_name, was_stopped
from rlsys.client.config import DeploymentSpec
from rlsys.errors import ActorDiedError, ClusterError
from rlsys.utils.text_files import first_line

CHECK_S = 5.0
VERIFY_S = 10.0  # for an actor that is suspected to be dead to answer
WINDOW_S = 600.0  # in which cluster.max_restarts deaths of an actor are replaced
Held = Mapping[str, tuple[object, int]]  # snapshot key -> (its reference, how often this client holds it)


@dataclass(eq=False, slots=True)
class Member:
    """One actor of the deployment. `starting`: the actor that takes its place, while it is brought up."""

    name: str
    launch: Callable[[], ActorHandle]
    handle: ActorHandle | None
    serves: bool = True
    joining: ActorHandle | None = None  # from when it is told of new snapshots
    starting: ActorHandle | None = None
    recovering: bool = False
    died_at: float = 0.0  # seconds since the epoch
    why: str = ""
    deaths: deque[float] = field(default_factory=deque)  # monotonic times within WINDOW_S
    returned: Future[ActorHandle] = field(default_factory=Future)  # when it serves again, or cannot

    @property
    def actors(self) -> list[ActorHandle]:
        """That take notice of snapshots."""
        return [actor for actor in (self.handle if self.serves else None, self.joining) if actor is not None]

    def down(self) -> ActorDiedError:
        at = time.strftime("%H:%M:%S", time.localtime(self.died_at))
        then = "it is being started again" if self.recovering else "it is not started again"
        return ActorDiedError(f"{self.name} died at {at} ({self.why}); {then}")


class Supervisor:
    """`held`: the snapshots of this client. `learner_died`: called with a text when the learner's runs are lost.
    `lock` guards the members and what this client holds."""

    def __init__(
        self,
        spec: DeploymentSpec,
        learner: ActorHandle,
        samplers: Sequence[ActorHandle | None],
        holder: str,
        may_start: bool,
        held: Callable[[], Held],
        learner_died: Callable[[str], None],
        servers: DeploymentServers,
    ) -> None:
        self._spec, self._holder, self._may_start, self._servers = spec, holder, may_start, servers
        self._held, self._learner_died = held, learner_died
        self.lock = threading.RLock()
        self.learner = Member(
            "learner", self._launching(learner_name(spec.key), lambda: launch_learner(spec, servers)), learner
        )
        self.samplers = [self._sampler(i, handle) for i, handle in enumerate(samplers)]
        self._turns = itertools.count()
        self._connection = connection()
        self._stopped = threading.Event()
        for sampler in self.samplers:
            if sampler.handle is None:
                self.dead(sampler, None, "it was gone when this client joined")
        threading.Thread(target=self._check_all, name="rlsys-supervisor", daemon=True).start()

    def stop(self) -> None:
        """No actor is asked or replaced after this returns."""
        with self.lock:
            self._stopped.set()

    @property
    def _connected(self) -> bool:
        """False after the end of the connection in which the actors are known, for which this client need not have been
        closed. In another one these actors are none of this client's."""
        return connection() is self._connection

    @property
    def actors(self) -> list[ActorHandle]:
        """All living ones, engines first."""
        members = (*self.samplers, self.learner)
        with self.lock:
            return [
                actor for each in members for actor in (each.handle if each.serves else None, each.starting) if actor
            ]

    def serving_sampler(self, besides: frozenset[str] = frozenset()) -> tuple[Member, ActorHandle]:
        """The next sampler in turn, which is not in `besides` (names).

        Raises:
            ActorDiedError: none serves.
        """
        with self.lock:
            for _ in self.samplers:
                member = self.samplers[next(self._turns) % len(self.samplers)]
                if member.serves and member.handle is not None and member.name not in besides:
                    return member, member.handle
            raise next((each for each in self.samplers if not each.serves), self.samplers[0]).down()

    def serving_learner(self) -> ActorHandle:
        with self.lock:
            if not self.learner.serves or self.learner.handle is None:
                raise self.learner.down()
            return self.learner.handle

    def when_learner_serves(self) -> Future[ActorHandle]:
        """The learner, at once or when it is back."""
        with self.lock:
            if self.learner.recovering:
                return self.learner.returned
            found: Future[ActorHandle] = Future()
            try:
                found.set_result(self.serving_learner())
            except ActorDiedError as error:
                found.set_exception(error)
            return found

    def suspect(self, member: Member, handle: ActorHandle) -> Future[bool]:
        """Ask the actor whether it is dead, as a call of it said. If so, it is replaced."""
        verdict: Future[bool] = Future()
        try:
            answer = self._asked(lambda: handle.check.remote(), member.name)
        except ClusterError:  # nothing can be asked any more
            verdict.set_result(False)
            return verdict

        def judge(done: Future[None]) -> None:
            error = done.exception()
            is_dead = isinstance(error, ActorDiedError)
            if is_dead:
                self.dead(member, handle, _reason(member, error))
            with suppress(InvalidStateError):  # its time was over
                verdict.set_result(is_dead)

        def give_up() -> None:
            with suppress(InvalidStateError):
                verdict.set_result(False)

        answer.add_done_callback(judge)
        timer = threading.Timer(VERIFY_S, give_up)
        timer.daemon = True
        timer.start()
        verdict.add_done_callback(lambda _: timer.cancel())
        return verdict

    def dead(self, member: Member, handle: ActorHandle | None, why: str) -> None:
        """Stop using the actor, and begin to replace it. The first report of an actor counts. All clients of the
        process see `why`, so it names no run."""
        with self.lock:
            if member.handle is not handle or (not member.serves and member.recovering):
                return
            if member.serves:
                member.serves, member.died_at, member.why = False, time.time(), why
                member.deaths.append(time.monotonic())
                if member is self.learner:
                    self._learner_died(f"died at {time.strftime('%H:%M:%S')} ({member.why})")
            self._recover(member)

    def _recover(self, member: Member) -> None:
        while member.deaths and time.monotonic() - member.deaths[0] > WINDOW_S:
            member.deaths.popleft()
        limit = self._spec.max_restarts
        if not self._connected:
            member.why = LEFT
            return
        if self._stopped.is_set():
            return
        if was_stopped(self._spec.key):
            member.why = "the deployment was stopped"
            return
        if len(member.deaths) > limit:
            if "cluster.max_restarts" not in member.why:
                member.why += (
                    f"; {len(member.deaths)} deaths within {WINDOW_S:g} s, and cluster.max_restarts is {limit}"
                )
            return
        member.recovering, member.returned = True, Future()
        threading.Thread(target=self._replace, args=(member,), name=f"rlsys-restart-{member.name}", daemon=True).start()

    def _replace(self, member: Member) -> None:
        dead = member.handle
        try:
            if dead is not None:
                with kept(self._connection), suppress(RayError, ValueError):
                    ray.kill(dead)  # where only its host process or engine died
            limit_s = self._spec.start_timeout_s
            deadline = time.monotonic() + limit_s
            found = another(member.name, dead, lambda: self._launched(member), limit_s)
            with self.lock:
                member.starting = found
                ended, closed = was_stopped(self._spec.key), self._stopped.is_set()
            if ended or closed:
                if self._may_start and (ended or self._spec.host.detached is None):
                    with kept(self._connection):
                        ray.kill(found)
                raise ClusterError("the deployment was stopped, or this client closed")
            if member is self.learner:
                self._asked(lambda: found.bring_up.remote(), f"{member.name}: starting again").result(limit_s)
            else:
                self._bring_up_sampler(member, found, deadline)
        except Exception as error:  # edge of a thread: whoever waits for the actor gets it
            self._not_replaced(member, error)
            return
        with self.lock:
            member.handle, member.serves, member.recovering = found, True, False
            member.joining = member.starting = None
        member.returned.set_result(found)

    def _asked(self, call: Callable[[], ray.ObjectRef], what: str) -> Future[Any]:
        """`future_of` a call of an actor. Any: as there.

        Raises:
            ClusterError: the connection has ended.
        """
        with kept(self._connection):
            return future_of(call(), what)

    def _launched(self, member: Member) -> ActorHandle:
        with kept(self._connection):
            return member.launch()

    def _bring_up_sampler(self, member: Member, found: ActorHandle, deadline: float) -> None:
        """Start the engine, have it prove its adapters, and give it the snapshots that this client holds."""
        learner = self.when_learner_serves().result(deadline - time.monotonic())
        what = f"{member.name}: starting again"
        self._asked(lambda: found.bring_up.remote(learner.probe.remote()), what).result(deadline - time.monotonic())
        with self.lock:  # from here on `found` is told of new snapshots and of releases
            member.joining = found
            held = dict(self._held())
        given = [
            self._asked(
                partial(found.register.remote, key, ref, self._holder, count), f"{member.name}: registering {key}"
            )
            for key, (ref, count) in held.items()
        ]
        for each in given:
            each.result(deadline - time.monotonic())

    def _not_replaced(self, member: Member, error: Exception) -> None:
        with self.lock:
            member.joining, member.starting, member.recovering = None, None, False
            member.deaths.append(time.monotonic())
            member.why = f"it could not be started again: {first_line(error)}"
            failure = member.down()
        member.returned.set_exception(failure)

    def _check_all(self) -> None:
        """Renew this client's lease with every actor, and replace those that are dead."""
        while not self._stopped.wait(CHECK_S) and self._connected:
            for member in (self.learner, *self.samplers):
                with self.lock, suppress(RayError, RuntimeError, ClusterError):  # the connection may end at this moment
                    if self._stopped.is_set():
                        return
                    if not member.serves and not member.recovering:
                        self._recover(member)
                    elif member.serves and member.handle is not None:
                        self._check(member, member.handle)

    def _check(self, member: Member, handle: ActorHandle) -> None:
        def judge(done: Future[None]) -> None:
            error = done.exception()
            if isinstance(error, ActorDiedError) and not self._stopped.is_set():
                self.dead(member, handle, _reason(member, error))

        self._asked(lambda: handle.renew.remote(self._holder), member.name).add_done_callback(judge)

    def _sampler(self, index: int, handle: ActorHandle | None) -> Member:
        spec = self._spec
        launch = self._launching(sampler_name(spec.key, index), lambda: launch_sampler(spec, index, self._servers))
        return Member(f"sampler {index}", launch, handle)

    def _launching(self, name: str, launch: Callable[[], ActorHandle]) -> Callable[[], ActorHandle]:
        """`launch`; for a client that may start no actors, finding the one that another client starts."""

        def found() -> ActorHandle:
            actor = find(name)
            if actor is None:
                raise ValueError(f"{name} is not there")
            return actor

        return launch if self._may_start else found


def _reason(member: Member, error: BaseException | None) -> str:
    return "" if error is None else first_line(error).removeprefix(f"{member.name}: ")
