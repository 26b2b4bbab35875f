"""Operations of models: create, load, forward, forward_backward, optim_step, save. Each becomes a promise."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from rlsys.client.backend import SnapshotHandle
from rlsys.client.requests import Forward, ForwardBackward, LoadState, SaveFolder, TakeSnapshot
from rlsys.client.requests import OptimStep as Step
from rlsys.config import LoraSection
from rlsys.errors import CheckpointError, ConfigError, RlsysError
from rlsys.learner.checkpoint_files import read_info
from rlsys.serve import sessions
from rlsys.serve.checkpoints import Record, RunRecord, size_of
from rlsys.serve.errors import NumberedRefusal, Refusal, bad_request, not_found
from rlsys.serve.model_queue import FIRST, MAX_AHEAD, Call
from rlsys.serve.paths import RUN_ID, CheckpointPath, Kind, checked_name, parse_path
from rlsys.serve.promises import Promise
from rlsys.serve.state import Model, Sampler, Session, State, now
from rlsys.serve.wire.passes import PassRequest, PreparedPass
from rlsys.serve.wire.requests import CreateModel, LoadWeights, LoraConfig, OptimStep, SaveWeights
from rlsys.serve.wire.results import JsonResult, PassResult, Result, laid_out
from rlsys.types import AdamParams, BatchResult

Answer = TypeVar("Answer")
FAILED_PARTS = "failed_forward_backward"  # metric of a step: calls since the last step whose gradient is not in it


def create_model(state: State, tenant: str, body: CreateModel) -> Promise:
    """A new adapter. Raises Refusal (400) for what can never be served."""
    session = state.session(body.session_id, tenant)
    known = session.models.get(body.model_seq_id)
    if known is not None:
        return known.created
    base = state.base(body.base_model)
    sessions.refuse_large("user_metadata", body.user_metadata, state.limits.metadata_bytes)
    if body.optimizer_config.type != "adamw":
        raise bad_request(f"optimizer_config.type: found {body.optimizer_config.type[:40]!r}; wanted 'adamw'")
    lora = _lora(body.lora_config, base.about.max_lora_rank, base.about.lora_alpha, base.about.serves_unembed)
    model = _new_model(state, session, body.model_seq_id, body.base_model)
    seed = body.lora_config.seed or 0

    async def create() -> Result:
        await state.backend.create_model(base, model.id, lora, seed)
        return await _created(state, model, lora, body.user_metadata, "create_model")

    state.spawn(_made(state, model, create()))
    return model.created


def load_weights(state: State, tenant: str, body: LoadWeights) -> Promise:
    """Load a checkpoint into a model, or create a model from it."""
    if body.model_id is not None:
        return _load_into(state, tenant, body)
    path = parse_path(body.path)
    if body.session_id is None or body.model_seq_id is None:
        raise bad_request("load_weights: wanted model_id and seq_id, or session_id and model_seq_id")
    session = state.session(body.session_id, tenant)
    known = session.models.get(body.model_seq_id)
    if known is not None:
        return known.created
    sessions.refuse_large("user_metadata", body.user_metadata, state.limits.metadata_bytes)
    try:
        found = state.store.find(tenant, path)
    except CheckpointError as error:
        raise bad_request(str(error)) from None
    base_model = body.base_model or base_of(state, found.tenant, path, found.folder)
    base = state.base(base_model)
    model = _new_model(state, session, body.model_seq_id, base_model)
    names = {str(found.folder): path.text}

    async def restore() -> Result:
        lora = await state.backend.restore_model(base, model.id, found.folder, body.optimizer)
        return await _created(state, model, lora, body.user_metadata, "load_weights", path=path.text)

    state.spawn(_made(state, model, restore(), names))
    return model.created


def run_pass(state: State, model: Model, request: PassRequest, prepared: PreparedPass) -> Promise:
    kind = Forward if request.forward_only else ForwardBackward

    def result(answer: BatchResult) -> Result:
        return PassResult(answer.metrics, laid_out(answer.logprobs, prepared.layout), prepared.layout)

    def begin() -> Awaitable[Result]:
        return _then(state.backend.call(model.id, kind(prepared.batch, prepared.loss)), result)

    state.counts["train_tokens"] += len(prepared.batch.tokens)
    return submit(state, model, request.seq_id, begin, is_pass=not request.forward_only)


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

    def result(metrics: dict[str, float]) -> Result:
        failed = model.failed_passes + model.queue.lost_passes
        model.failed_passes = model.queue.lost_passes = 0
        shown = {**metrics, FAILED_PARTS: float(failed)} if failed else metrics
        return JsonResult({"type": "optim_step", "metrics": shown})

    def begin() -> Awaitable[Result]:
        return _then(state.backend.call(model.id, Step(adam)), result)

    state.counts["steps"] += 1
    return submit(state, model, body.seq_id, begin)


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
    return _save_ephemeral(state, model, body.seq_id, body.sampling_session_seq_id)


def unload_model(state: State, tenant: str, model_id: str) -> Promise:
    model = state.model(model_id, tenant)
    promise = sessions.promise_of(state, model.session, model.id)
    sessions.release_model(state, model, "the model was unloaded")
    state.promises.settle(promise, JsonResult({"type": "unload_model", "model_id": model.id}))
    return promise


def entering(state: State, tenant: str, model_id: str, seq: int) -> tuple[Model, Promise | None]:
    """The model, and the promise of this call if it came before.

    Raises:
        Refusal: 404: no such model; 400: the number was refused before, or is none.
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
    if request_id is None:
        return model, None
    return model, state.promises.known(request_id, model.session.tenant, model.session.id, model.id)


def refused(model: Model, seq: int, why: str, is_pass: bool = False) -> Refusal:
    """The refusal of a call whose number is known: the number is used up, because the client goes on with the next."""
    model.queue.refuse(seq, why, is_pass)
    return bad_request(why)


def use_up(state: State, tenant: str, refusal: NumberedRefusal) -> None:
    """Note the number of a call whose body was refused."""
    model = state.models.get(refusal.model_id)
    if model is not None and model.session.tenant == tenant:
        model.queue.refuse(refusal.seq_id, refusal.detail, refusal.is_pass)


def submit(
    state: State, model: Model, seq: int, begin: Callable[[], Awaitable[Result]], is_pass: bool = False
) -> Promise:
    """Enter a call. `begin` submits it to the backend and returns at once; calls begin in the order of numbers."""
    request_id = model.queue.request_of(seq)
    if request_id is not None:  # a repeated request that was decoded at the same time as the first
        return state.promises.known(request_id, model.session.tenant, model.session.id, model.id)
    promise = sessions.promise_of(state, model.session, model.id)

    def start() -> None:
        before, done = model.last_done, asyncio.Event()
        model.last_done = done
        try:
            work = begin()
        except RlsysError as error:
            work = _failed(error)
        state.spawn(_finish(state, model, promise, work, before, done, is_pass))

    def fail(why: str) -> None:
        state.fail(promise, why)

    promise.queue_reason = lambda: _waiting_for(state, model, seq)
    model.queue.enter(seq, Call(promise.id, start, fail, is_pass))
    return promise


def base_of(state: State, tenant: str, path: CheckpointPath, folder: Path) -> str:
    """Name of the base on which a checkpoint was trained."""
    run = state.store.run(tenant, path.run_id)
    if run is not None:
        return run.base_model
    return read_info(folder).base_name


async def _finish(
    state: State,
    model: Model,
    promise: Promise,
    work: Awaitable[Result],
    before: asyncio.Event | None,
    done: asyncio.Event,
    is_pass: bool,
) -> None:
    """Settle in the order of the calls, so that a step knows which of its parts failed."""

    async def ordered() -> Result:
        try:
            return await work
        except BaseException:
            model.failed_passes += is_pass
            raise
        finally:
            if before is not None:
                await before.wait()

    try:
        await state.settle(promise, ordered())
    finally:
        done.set()


async def _then(answer: Awaitable[Answer], make: Callable[[Answer], Result]) -> Result:
    return make(await answer)


async def _failed(error: RlsysError) -> Result:
    raise error


def _waiting_for(state: State, model: Model, seq: int) -> str | None:
    if seq > model.queue.next:
        return f"call {seq} waits for call {model.queue.next} of its model, which has not arrived"
    others = sum(1 for each in state.models.values() if each.base is model.base) - 1
    return f"{others} other models share this learner" if others else None


def _models_of(state: State, tenant: str) -> int:
    return sum(each.session.tenant == tenant for each in state.models.values())


def _new_model(state: State, session: Session, number: int, base_model: str) -> Model:
    if _models_of(state, session.tenant) >= state.limits.models:
        sessions.end_unheard(state, session.tenant)
    mine = _models_of(state, session.tenant)
    if mine >= state.limits.models:
        raise bad_request(
            f"models: found {mine} that are open; wanted at most limits.models = {state.limits.models}: end a session "
            "that is not needed"
        )
    model_id = f"{session.id}:train:{number}"
    created = sessions.promise_of(state, session, model_id)
    model = Model(model_id, session, state.base(base_model), base_model, created, sessions.new_queue(state, session))
    session.models[number] = model
    state.models[model_id] = model
    return model


async def _made(state: State, model: Model, work: Awaitable[Result], names: dict[str, str] | None = None) -> None:
    """Settle the creation. A model that could not be created is gone."""
    await state.settle(model.created, work, names)
    if model.lora is None:
        state.models.pop(model.id, None)
        model.queue.abandon("the model could not be created")
    elif model.session.ended is not None:
        sessions.release_model(state, model, "the session of this model has ended")


async def _created(
    state: State, model: Model, lora: LoraSection, user_metadata: dict[str, Any], kind: str, **more: str
) -> Result:
    model.lora = lora
    record = RunRecord(
        run_id=model.id,
        session_id=model.session.id,
        base_model=model.base_model,
        lora_rank=lora.rank,
        train_unembed=lora.train_unembed,
        train_mlp=lora.train_mlp,
        train_attn=lora.train_attn,
        created_at=now(),
        last_request_time=now(),
        user_metadata=user_metadata,
    )
    await asyncio.to_thread(state.store.put_run, model.session.tenant, record)
    return JsonResult({"type": kind, "model_id": model.id, **more})


def _lora(asked: LoraConfig, max_rank: int, alpha: float, serves_unembed: bool) -> LoraSection:
    if asked.rank > max_rank:
        raise bad_request(f"lora_config.rank: found {asked.rank}; this server serves at most {max_rank}")
    unembed = asked.train_unembed and serves_unembed
    if not (asked.train_mlp or asked.train_attn or unembed):
        raise bad_request("lora_config: found no target to train; wanted train_mlp or train_attn")
    return LoraSection(
        rank=asked.rank,
        alpha=alpha,
        train_mlp=asked.train_mlp,
        train_attn=asked.train_attn,
        train_unembed=unembed,
    )


def _load_into(state: State, tenant: str, body: LoadWeights) -> Promise:
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

    def begin() -> Awaitable[Result]:
        found = state.store.find(tenant, path)
        call = state.backend.call(model.id, LoadState(str(found.folder), body.optimizer))
        return _named(
            _then(call, lambda _: JsonResult({"type": "load_weights", "path": path.text})), found.folder, path
        )

    return submit(state, model, body.seq_id, begin)


def _save_named(state: State, model: Model, body: SaveWeights, path: CheckpointPath) -> Promise:
    tenant = model.session.tenant
    taken = f"{path.text}: is already there; wanted another name, or overwrite=True"

    async def saved(call: Awaitable[str], folder: Path) -> Result:
        try:
            await call
        except CheckpointError as error:
            text = str(error)
            raise CheckpointError(taken if "is already there" in text else text) from error
        time = now()
        expires = None if body.ttl_seconds is None else time + timedelta(seconds=body.ttl_seconds)
        record = Record(
            time=time,
            expires_at=expires,
            user_metadata=body.user_metadata,
            size_bytes=await asyncio.to_thread(size_of, folder),
        )
        await asyncio.to_thread(state.store.put_record, tenant, path, record)
        return JsonResult({"type": _SAVES[path.kind], "path": path.text})

    def begin() -> Awaitable[Result]:
        folder = state.store.folder(tenant, path)
        if folder.exists() and not body.overwrite:
            raise CheckpointError(taken)
        request = SaveFolder(str(folder), path.kind == "weights", body.overwrite)
        return _named(saved(state.backend.call(model.id, request), folder), folder, path)

    return submit(state, model, body.seq_id, begin)


_SAVES = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}


def _save_ephemeral(state: State, model: Model, seq: int, number: int) -> Promise:
    session = model.session

    def result(snapshot: SnapshotHandle) -> Result:
        sampler = Sampler(
            id=f"{session.id}:sample:{number}",
            session=session,
            base=model.base,
            base_model=model.base_model,
            snapshot=snapshot,
            path=None,
            is_ephemeral=True,
        )
        if session.ended is not None:
            state.backend.release(model.base, snapshot)
            raise ConfigError(f"the session of this model has ended: {session.ended}")
        session.samplers[number] = sampler
        sessions.add_sampler(state, sampler)
        return JsonResult({"type": "save_weights_for_sampler", "sampling_session_id": sampler.id})

    def begin() -> Awaitable[Result]:
        return _then(state.backend.call(model.id, TakeSnapshot()), result)

    return submit(state, model, seq, begin)


async def _named(work: Awaitable[Result], folder: Path, path: CheckpointPath) -> Result:
    """Errors of a checkpoint name its path, and never its folder."""
    try:
        return await work
    except RlsysError as error:
        raise type(error)(str(error).replace(str(folder), path.text)) from error


def _lost(state: State, tenant: str, model_id: str) -> Refusal:
    """A run of an earlier server or an ended session, or none."""
    if not RUN_ID.fullmatch(model_id) or state.store.run(tenant, model_id) is None:
        return not_found("model", model_id[:100])
    saved = next((each for each in state.store.checkpoints(tenant, model_id) if each.path.kind == "weights"), None)
    last = "it has no checkpoint" if saved is None else f"its last checkpoint is {saved.path.text}"
    return Refusal(404, f"model {model_id!r}: is not loaded: its session ended, or its server did; {last}")
