"""One client's view of a deployment on Ray: sends its calls to the learner and the samplers that are alive."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import Any, TypeVar, cast

import ray
from ray.actor import ActorHandle

from actors.service.call_futures import failed, follow, future_of, gathered, together, values_of
from actors.service.fork_servers import DeploymentServers
from actors.service.function_shipping import ship
from actors.service.supervisor import Member, Supervisor
from rlsys.answer_parts import AnswerParts, PartsRequest
from rlsys.client.backend import About, Adopted, Answer, ModelHandle, RunProgress, SampleAnswer, SnapshotHandle
from rlsys.client.config import DeploymentSpec
from rlsys.client.requests import Drop, Request, TakeSnapshot
from rlsys.config import LoraSection
from rlsys.errors import ActorDiedError, DataLostError, RunLostError
from rlsys.types import Array, SamplingParams

T = TypeVar("T")
Call = Callable[[ActorHandle], ray.ObjectRef]


class RayDeployment:
    """`rlsys.client.backend.Deployment`. `may_start`: whether this client replaces dead actors by itself."""

    def __init__(
        self,
        about: About,
        spec: DeploymentSpec,
        learner: ActorHandle,
        samplers: Sequence[ActorHandle | None],
        model_id: Callable[[], str],
        may_start: bool,
        servers: DeploymentServers,
    ) -> None:
        self.about = about
        self._model_id = model_id
        self._holder = uuid.uuid4().hex
        self._held: dict[str, tuple[Any, int]] = {}  # snapshot key -> (list with its reference, number of holds)
        self._runs: set[str] = set()
        self._lost: dict[str, str] = {}  # model id -> how its learner died
        self._unneeded: deque[Callable[[], object]] = deque()
        self._supervisor = Supervisor(
            spec, learner, samplers, self._holder, may_start, lambda: self._held, self._lose_runs, servers
        )

    @property
    def actors(self) -> list[ActorHandle]:
        """All that are alive, engines first."""
        return self._supervisor.actors

    @property
    def num_samplers(self) -> int:
        return len(self._supervisor.samplers)

    def create_model(
        self, lora: LoraSection, seed: int, model_id: str | None = None, tenant: str | None = None
    ) -> Future[ModelHandle]:
        name = self._new_run(model_id)
        return self._on_learner(
            f"creating {name}", lambda learner: learner.create_model.remote(name, lora, seed, self._holder, tenant)
        )

    def restore_model(
        self, path: str, optimizer: bool, model_id: str | None = None, tenant: str | None = None
    ) -> Future[ModelHandle]:
        name = self._new_run(model_id)
        return self._on_learner(
            f"restoring {path}",
            lambda learner: learner.restore_model.remote(name, path, optimizer, self._holder, tenant),
        )

    def submit(self, model_id: str, seq: int, request: Request[Answer]) -> Future[Answer]:
        self.let_go()
        what = f"training client {model_id}: {request.op}"
        with self._supervisor.lock:
            if model_id in self._lost:
                return failed(RunLostError(_lost(model_id, self._lost[model_id])))
            try:
                learner = self._supervisor.serving_learner()
            except ActorDiedError as error:
                return failed(error)
        answer: Future[Answer] = self._of_learner(learner, learner.submit.remote(model_id, seq, request), what)
        if isinstance(request, TakeSnapshot):  # so the Answer is a SnapshotHandle, which mypy does not follow
            return cast("Future[Answer]", self._register(cast("Future[SnapshotHandle]", answer)))
        return answer

    def ship(self, fn: Callable[..., object]) -> bytes:
        return ship(fn)

    def open(self, path: str, tenant: str | None = None) -> Future[SnapshotHandle]:
        opened: Future[SnapshotHandle] = self._on_learner(
            f"opening {path}", lambda learner: learner.open.remote(path, tenant or self._holder)
        )
        return self._register(opened)

    def sample(
        self,
        snapshot: SnapshotHandle | None,
        prompt: Array,
        n: int,
        params: SamplingParams,
        prompt_logprobs: bool,
        topk: int,
    ) -> Future[SampleAnswer]:
        key = None if snapshot is None else snapshot.key
        return self._on_a_sampler(
            "sampling", lambda sampler: sampler.sample.remote(key, prompt, n, params, prompt_logprobs, topk)
        )

    async def parts(self, snapshot: SnapshotHandle | None, request: PartsRequest) -> AsyncGenerator[AnswerParts, None]:
        """As `sample`, in parts as they are sampled. Closing the generator aborts the request in the engine."""
        self.let_go()
        member, sampler = self._supervisor.serving_sampler()
        key = None if snapshot is None else snapshot.key
        refs = sampler.parts.options(num_returns="streaming").remote(key, request)
        async with aclosing(values_of(refs, f"{member.name}: sampling")) as parts:
            try:
                async for part in parts:
                    yield part
            except ActorDiedError:
                self._supervisor.suspect(member, sampler)
                raise

    def check(self) -> list[Future[object]]:
        """One future per actor, done when the actor has answered that it can work; one that is dead fails at once."""
        with self._supervisor.lock:
            members = [self._supervisor.learner, *self._supervisor.samplers]
            handles = [(each, each.handle) for each in members]
            down: list[Future[object]] = [failed(each.down()) for each in members if not each.serves]
        asked = [(each, handle) for each, handle in handles if each.serves and handle is not None]
        return [*down, *(future_of(handle.check.remote(), f"{each.name}: answering") for each, handle in asked)]

    def logprobs(self, snapshot: SnapshotHandle | None, tokens: Array) -> Future[Array]:
        key = None if snapshot is None else snapshot.key
        return self._on_a_sampler("scoring", lambda sampler: sampler.logprobs.remote(key, tokens))

    def release(self, snapshot: SnapshotHandle) -> None:
        """Queue the release, and send it with the next call: the garbage collector calls this in any thread, at any
        time."""
        self._unneeded.append(lambda: self._release(snapshot.key))

    def drop_model(self, model_id: str, seq: int) -> None:
        """Queue the removal of a run, as `release` does; `seq` orders it among the run's calls."""
        self._unneeded.append(lambda: self._drop(model_id, seq))

    def progress(self) -> Future[Mapping[str, RunProgress]]:
        return self._on_learner("telling the progress of its runs", lambda learner: learner.progress.remote())

    def adopt(self, model_ids: Sequence[str], snapshot_keys: Sequence[str] = ()) -> Future[Adopted]:
        runs: Future[Mapping[str, RunProgress]] = self._on_learner(
            "adopting runs", lambda learner: learner.adopt.remote(list(model_ids), self._holder)
        )
        with self._supervisor.lock:
            samplers = [actor for member in self._supervisor.samplers for actor in member.actors]
        adopting = [
            future_of(sampler.adopt.remote(list(snapshot_keys), self._holder), "sampler: adopting snapshots")
            for sampler in samplers
        ]
        return gathered([runs, *adopting], self._adopted)

    def close(self) -> None:
        """Stop renewing: what this client holds is released after a while, unless its actors end now."""
        self._supervisor.stop()

    def let_go(self) -> None:
        """Send the releases that are queued."""
        with suppress(IndexError):  # empty, perhaps emptied by another thread
            while True:
                self._unneeded.popleft()()

    # calls of the learner

    def _on_learner(self, what: str, call: Call) -> Future[Any]:  # a handle's methods have no types
        """The answer of the learner; if it is being started again, of the new one."""

        def begin(learner: ActorHandle) -> Future[Any]:
            return self._of_learner(learner, call(learner), f"learner: {what}")

        return follow(self._supervisor.when_learner_serves(), begin)

    def _of_learner(self, learner: ActorHandle, ref: ray.ObjectRef, what: str) -> Future[Any]:
        """As `future_of`. A death of the learner is reported, and said in the error."""
        answer = future_of(ref, what)

        def checked(done: Future[Any]) -> Future[Any]:
            error = done.exception()
            if not isinstance(error, ActorDiedError):
                return done
            self._supervisor.dead(self._supervisor.learner, learner, str(error).removeprefix(f"{what}: "))
            return failed(
                ActorDiedError(
                    f"{what}: the learner died ({str(error).removeprefix(f'{what}: ')}), and its runs are lost; their "
                    "checkpoints remain. New models can be created: they wait until it has been started again"
                )
            )

        return follow(answer, lambda _: answer, checked)

    def _lose_runs(self, how: str) -> None:
        self._lost.update(dict.fromkeys(self._runs, how))
        self._runs.clear()

    def _new_run(self, model_id: str | None) -> str:
        name = model_id or self._model_id()
        with self._supervisor.lock:
            self._runs.add(name)
        return name

    def _drop(self, model_id: str, seq: int) -> None:
        with self._supervisor.lock, suppress(ActorDiedError):
            self._runs.discard(model_id)
            if self._lost.pop(model_id, None) is None:
                self._supervisor.serving_learner().submit.remote(model_id, seq, Drop())

    # calls of samplers

    def _on_a_sampler(self, what: str, call: Call) -> Future[Any]:
        """The answer of the next sampler; of another one if that sampler dies, or lacks a snapshot that was lost with
        the learner before the sampler loaded it."""
        self.let_go()
        return self._on_next_sampler(what, call, frozenset(), None)

    def _on_next_sampler(
        self, what: str, call: Call, tried: frozenset[str], failure: BaseException | None
    ) -> Future[Any]:
        try:
            member, sampler = self._supervisor.serving_sampler(tried)
        except ActorDiedError as error:
            return failed(failure or error)
        answer = future_of(call(sampler), f"{member.name}: {what}")

        def checked(done: Future[Any]) -> Future[Any]:
            error = done.exception()
            if isinstance(error, DataLostError):
                return self._on_next_sampler(what, call, tried | {member.name}, error)
            if not isinstance(error, ActorDiedError):
                return done
            return follow(
                self._supervisor.suspect(member, sampler),
                lambda is_dead: self._on_next_sampler(what, call, tried, failure) if is_dead else done,
            )

        return follow(answer, lambda _: answer, checked)

    def _register(self, answer: Future[SnapshotHandle]) -> Future[SnapshotHandle]:
        """Register the snapshot with every sampler before the caller gets it: async actors do not keep the order of
        calls. A sampler that dies meanwhile gets it when it is started again."""

        def register(handle: SnapshotHandle) -> Future[SnapshotHandle]:
            with self._supervisor.lock:
                ref, count = self._held.get(handle.key, (handle.ref, 0))
                self._held[handle.key] = ref, count + 1
                calls = [
                    self._unless_dead(
                        member, actor.register.remote(handle.key, handle.ref, self._holder), f"registering {handle.key}"
                    )
                    for member in self._supervisor.samplers
                    for actor in member.actors
                ]
            registered: Future[SnapshotHandle] = Future()
            if not calls:
                registered.set_result(handle)
            else:
                together(calls, registered, handle)
            return registered

        return follow(answer, register)

    def _unless_dead(self, member: Member, ref: ray.ObjectRef, what: str) -> Future[Any]:
        answer = future_of(ref, f"{member.name}: {what}")

        def checked(done: Future[Any]) -> Future[Any]:
            if not isinstance(done.exception(), ActorDiedError):
                return done
            nothing: Future[None] = Future()
            nothing.set_result(None)
            return nothing

        return follow(answer, lambda _: answer, checked)

    def _release(self, key: str) -> None:
        with self._supervisor.lock:
            ref, count = self._held.pop(key, (None, 0))
            if count > 1:
                self._held[key] = ref, count - 1
            for member in self._supervisor.samplers:
                for actor in member.actors:
                    actor.release.remote(key, self._holder)

    def _adopted(self, runs: Mapping[str, RunProgress], *found: Mapping[str, Any]) -> Adopted:
        """Note what was adopted. `found`: of each sampler, the references of the snapshots that it has."""
        kept = [key for key in (found[0] if found else ()) if all(key in each for each in found)]
        with self._supervisor.lock:
            self._runs.update(runs)
            for key in kept:
                _, count = self._held.get(key, (None, 0))
                self._held[key] = found[0][key], count + 1
        return Adopted(runs, tuple(kept))


def _lost(model_id: str, how: str) -> str:
    return (
        f"training client {model_id}: the learner of this run {how}, and the run is lost; its checkpoints remain. "
        "Create a training client from the last one"
    )
