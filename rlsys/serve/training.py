"""Calls of models: passes, steps, loads and saves. Each becomes a promise; they begin in the order of their numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from rlsys.client.requests import Forward, ForwardBackward, LoadState, Request, SaveFolder, TakeSnapshot
from rlsys.client.requests import OptimStep as Step
from rlsys.errors import ActorDiedError, ActorFailedError, ConfigError, RlsysError, RunLostError, StorageError
from rlsys.serve import parking, rows, sessions
from rlsys.serve.checkpoints import Record
from rlsys.serve.errors import BusyError, NumberedRefusal, Refusal, bad_request, not_found
from rlsys.serve.model_queue import FIRST, MAX_AHEAD, Call
from rlsys.serve.outcomes import LoadOutcome, Outcome, PassOutcome, SaveOutcome, SnapshotOutcome, StepOutcome, taken
from rlsys.serve.paths import RUN_ID, CheckpointPath, Kind, checked_name, parse_path
from rlsys.serve.promises import Promise
from rlsys.serve.state import Model, State, now
from rlsys.serve.wire.passes import PreparedPass
from rlsys.serve.wire.requests import LoadWeights, OptimStep, SaveWeights
from rlsys.serve.wire.results import JsonResult, Result
from rlsys.types import AdamParams

LOST = "this call was lost with the server's state before it had an effect; repeat it"
Prepare = Callable[[], tuple[Request[Any], Outcome]]  # Any: each request has its own answer


def run_pass(state: State, model: Model, seq: int, forward_only: bool, prepared: PreparedPass) -> Promise:
    def prepare() -> tuple[Request[Any], Outcome]:
        kind = Forward if forward_only else ForwardBackward
        return kind(prepared.batch, prepared.loss), PassOutcome(prepared.layout, not forward_only)

    state.counts["train_tokens"] += len(prepared.batch.tokens)
    return submit(state, model, seq, prepare, is_pass=not forward_only)


def optim_step(state: State, tenant: str, body: OptimStep) -> Promise:
    model, known = entering(state, tenant, body.model_id, body.seq_id)
    if known is not None:
        return known
    if body.optimizer_params.type != "adamw":
        raise refused(
            model, body.seq_id, f"optimizer_params.type: found {body.optimizer_params.type[:40]!r}; wanted 'adamw'"
        )
    try:
        adam = AdamParams(**body.adam_params.model_dump())
    except ConfigError as error:
        raise refused(model, body.seq_id, str(error)) from None
    state.counts["steps"] += 1
    return submit(state, model, body.seq_id, lambda: (Step(adam), StepOutcome()))


def load_into(state: State, tenant: str, body: LoadWeights) -> Promise:
    """Load a checkpoint into the model `body.model_id`."""
    assert body.model_id is not None
    if body.seq_id is None:
        raise bad_request("seq_id: is missing")
    model, known = entering(state, tenant, body.model_id, body.seq_id)
    if known is not None:
        return known
    try:
        path = parse_path(body.path)
    except Refusal as refusal:
        raise refused(model, body.seq_id, refusal.detail) from None

    def prepare() -> tuple[Request[Any], Outcome]:
        folder = str(state.store.find(tenant, path).folder)
        return LoadState(folder, body.optimizer), LoadOutcome(path.text, folder)

    return submit(state, model, body.seq_id, prepare)


def save(state: State, tenant: str, body: SaveWeights, kind: Kind) -> Promise:
    """Save under a name; or, without one, make a sampling session of the current weights."""
    model, known = entering(state, tenant, body.model_id, body.seq_id)
    if known is not None:
        return known
    try:
        sessions.refuse_large("user_metadata", body.user_metadata, state.limits.metadata_bytes)
        if body.age_encryption_recipients:
            raise bad_request(
                "age_encryption_recipients: this server does not encrypt downloads; save without recipients, over TLS"
            )
        if kind == "sampler_weights" and body.kind != "snapshot":
            raise bad_request(f"kind: found {body.kind[:40]!r}; wanted 'snapshot': samplers here are immutable")
        if body.path is not None:
            return _save_named(state, model, body, CheckpointPath(model.id, kind, checked_name(body.path)))
        if kind != "sampler_weights" or body.sampling_session_seq_id is None:
            raise bad_request("path: is missing; wanted the name of the checkpoint")
        sessions.make_room(state, tenant)
    except Refusal as refusal:
        raise refused(model, body.seq_id, refusal.detail) from None
    outcome = SnapshotOutcome(body.sampling_session_seq_id)
    return submit(state, model, body.seq_id, lambda: (TakeSnapshot(), outcome))


def unload_model(state: State, tenant: str, model_id: str) -> Promise:
    model = state.model(model_id, tenant)
    promise = sessions.promise_of(state, model.session, model.id)
    sessions.release_model(state, model, "the model was unloaded")
    state.promises.settle(promise, JsonResult({"type": "unload_model", "model_id": model.id}))
    return promise


def entering(state: State, tenant: str, model_id: str, seq: int) -> tuple[Model, Promise | None]:
    """The model, and the promise of this call if it came before.

    Raises:
        Refusal: 404: no such model; 400: the number was refused before, or is none; 429: the tenant has too many calls.
    """
    model = state.models.get(model_id)
    if model is None:
        raise _lost(state, tenant, model_id)
    model = state.model(model_id, tenant)
    if not FIRST <= seq < model.queue.next + MAX_AHEAD:
        raise bad_request(f"seq_id: found {seq}; wanted {FIRST} to {model.queue.next + MAX_AHEAD - 1}")
    why = model.queue.refusal_of(seq)
    if why is not None:
        raise bad_request(why)
    request_id = model.queue.request_of(seq)
    if request_id is not None:
        return model, state.promises.known(request_id, model.session.tenant, model.session.id, model.id)
    found, most = state.calls_queued[tenant], state.limits.queued_calls
    if found >= most and seq > model.queue.next:  # the next call of a model always gets in: others wait for it
        raise Refusal(
            429,
            f"calls: found {found} that wait or run; wanted at most limits.queued_calls = {most}",
            {"Retry-After": "1"},
        )
    return model, None


def refused(model: Model, seq: int, why: str, is_pass: bool = False) -> Refusal:
    """The refusal of a call whose number is known: the number is used up, because the client goes on with the next."""
    model.queue.refuse(seq, why, is_pass)
    return bad_request(why)


def use_up(state: State, tenant: str, refusal: NumberedRefusal) -> None:
    """Note the number of a call whose body was refused."""
    model = state.models.get(refusal.model_id)
    if model is not None and model.session.tenant == tenant:
        model.queue.refuse(refusal.seq_id, refusal.detail, refusal.is_pass)


def submit(state: State, model: Model, seq: int, prepare: Prepare, is_pass: bool = False) -> Promise:
    """Enter a call. `prepare` is called when its turn comes, and may raise an RlsysError: the call's result."""
    request_id = model.queue.request_of(seq)
    if request_id is not None:  # a repeated request that was decoded at the same time as the first
        return state.promises.known(request_id, model.session.tenant, model.session.id, model.id)
    promise = sessions.promise_of(state, model.session, model.id)
    call = _Entered(state, model, promise, prepare, is_pass)
    start = call.start
    try:
        rows.put_entered(state.database, promise.id, model.id, seq, is_pass)
    except BusyError:
        state.promises.drop(promise)
        raise  # the client repeats the request
    except StorageError as error:  # the call's result: clients repeat a refused request of this kind for minutes
        start = partial(call.fail, error)
    tenant = model.session.tenant
    state.calls_queued[tenant] += 1
    promise.when_settled = lambda: state.calls_queued.subtract([tenant])
    promise.queue_reason = lambda: _waiting_for(state, model, seq)
    model.queue.enter(seq, Call(promise.id, start, lambda why: state.fail(promise, why), is_pass))
    return promise


def resume(state: State, model: Model, promise: Promise, number: int, outcome: Outcome) -> None:
    """Finish a call that an earlier controller began as the learner's call `number`."""
    answer: Awaitable[Any] = state.backend.call(model.id, number, outcome.repeated)
    _follow(state, model, promise, _of_the_first(answer), outcome)


@dataclass(frozen=True, slots=True)
class _Entered:
    """A call of a model, in its turn: `rlsys.serve.state.Held`."""

    state: State
    model: Model
    promise: Promise
    prepare: Prepare
    is_pass: bool

    def start(self) -> None:
        parking.when_resident(self.state, self.model, self)

    def go(self) -> None:
        state, model = self.state, self.model
        outcome = Outcome()
        try:
            request, outcome = self.prepare()
            rows.put_begun(state.database, self.promise.id, model.id, model.calls + 1, outcome.text())
            model.calls += 1
            work: Awaitable[Any] = state.backend.call(model.id, model.calls, request)
        except RlsysError as error:
            work = _failed(error)
        _follow(state, model, self.promise, work, outcome)

    def fail(self, error: RlsysError) -> None:
        self.model.failed_passes += self.is_pass
        _follow(self.state, self.model, self.promise, _failed(error), Outcome())


def _follow(state: State, model: Model, promise: Promise, work: Awaitable[Any], outcome: Outcome) -> None:
    """Settle in the order of the calls, so that a step knows which of its parts failed."""
    before, done = model.last_done, asyncio.Event()
    model.last_done = done
    model.running += 1

    async def ordered() -> Result:
        try:
            answer = await work
        except RlsysError as error:
            await _after(before)
            if isinstance(error, ActorDiedError | RunLostError):  # in either the learner died
                sessions.lose_model(state, model, str(error))
            raise outcome.failed(state, model, error) from error
        await _after(before)
        return await outcome.result(state, model, answer)

    async def finish() -> None:
        try:
            await state.settle(promise, ordered())
        finally:
            model.running -= 1
            done.set()
            if model.id in state.models:
                rows.put_counts(state.database, model)

    state.spawn(finish())


async def _of_the_first(answer: Awaitable[Any]) -> Any:
    """A call that never reached the learner, while later ones did, is answered by the request that took its number."""
    found = await answer
    if found is None:
        raise ActorFailedError(LOST)
    return found


async def _after(before: asyncio.Event | None) -> None:
    if before is not None:
        await before.wait()


async def _failed(error: RlsysError) -> Any:
    raise error


def _waiting_for(state: State, model: Model, seq: int) -> str | None:
    if seq > model.queue.next:
        return f"call {seq} waits for call {model.queue.next} of its model, which has not arrived"
    others = sum(1 for each in state.models.values() if each.base is model.base) - 1
    return f"{others} other models share this learner" if others else None


def _save_named(state: State, model: Model, body: SaveWeights, path: CheckpointPath) -> Promise:
    tenant = model.session.tenant

    def prepare() -> tuple[Request[Any], Outcome]:
        folder = state.store.folder(tenant, path)
        if folder.exists() and not body.overwrite:
            raise taken(path)
        time = now()
        expires = None if body.ttl_seconds is None else time + timedelta(seconds=body.ttl_seconds)
        record = Record(time=time, expires_at=expires, user_metadata=body.user_metadata)
        replaced = state.store.get(tenant, path)
        state.store.put_record(tenant, path, record)
        return SaveFolder(str(folder), path.kind == "weights", body.overwrite), SaveOutcome(
            path, record, None if replaced is None else replaced.record
        )

    return submit(state, model, body.seq_id, prepare)


def _lost(state: State, tenant: str, model_id: str) -> Refusal:
    """A run of an earlier server or an ended session, or none."""
    run = state.store.run(tenant, model_id) if RUN_ID.fullmatch(model_id) else None
    if run is None:
        return not_found("model", model_id[:100])
    saved = next((each for each in state.store.checkpoints(tenant, model_id) if each.path.kind == "weights"), None)
    last = "it has no checkpoint" if saved is None else f"its last checkpoint is {saved.path.text}"
    why = run.ended or "its session ended, or its server did"
    return Refusal(404, f"model {model_id!r}: is not loaded: {why}; {last}")
