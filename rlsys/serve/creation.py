"""Models: a new adapter, or one from a checkpoint. Each creation becomes a promise."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from rlsys.config import LoraSection
from rlsys.errors import CheckpointError, StorageError
from rlsys.learner.checkpoint_files import read_info
from rlsys.serve import rows, sessions
from rlsys.serve.checkpoints import RunRecord
from rlsys.serve.errors import bad_request
from rlsys.serve.paths import CheckpointPath, parse_path
from rlsys.serve.promises import Promise
from rlsys.serve.state import Model, Session, State, now
from rlsys.serve.training import load_into
from rlsys.serve.wire.requests import CreateModel, LoadWeights, LoraConfig
from rlsys.serve.wire.results import JsonResult, Result


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
        await state.backend.create_model(base, model.id, tenant, lora, seed)
        return _created(state, model, lora, body.user_metadata, "create_model")

    state.spawn(_made(state, model, create()))
    return model.created


def load_weights(state: State, tenant: str, body: LoadWeights) -> Promise:
    """Load a checkpoint into a model, or create a model from it."""
    if body.model_id is not None:
        return load_into(state, tenant, body)
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
        lora = await state.backend.restore_model(base, model.id, tenant, found.folder, body.optimizer)
        return _created(state, model, lora, body.user_metadata, "load_weights", path=path.text)

    state.spawn(_made(state, model, restore(), names))
    return model.created


def base_of(state: State, tenant: str, path: CheckpointPath, folder: Path) -> str:
    """Name of the base on which a checkpoint was trained."""
    run = state.store.run(tenant, path.run_id)
    if run is not None:
        return run.base_model
    return read_info(folder).base_name


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
    queue = sessions.new_queue(state, session, model_id)
    model = Model(model_id, session, state.base(base_model), base_model, created, number, queue)
    try:
        rows.put_model(state.database, model)
    except StorageError:
        state.promises.drop(created)
        raise
    session.models[number] = model
    state.models[model_id] = model
    return model


async def _made(state: State, model: Model, work: Awaitable[Result], names: dict[str, str] | None = None) -> None:
    """Settle the creation. A model that could not be created is gone."""
    await state.settle(model.created, work, names)
    if model.lora is None:  # the learner may have it all the same: its record could not be written
        sessions.release_model(state, model, "the model could not be created")
        rows.forget_model(state.database, model.id)
    elif model.session.ended is not None:
        sessions.release_model(state, model, "the session of this model has ended")


def _created(
    state: State, model: Model, lora: LoraSection, user_metadata: dict[str, Any], kind: str, **more: str
) -> Result:
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
    state.store.put_run(model.session.tenant, record)
    model.lora = lora
    if model.session.ended is None:
        rows.put_model(state.database, model)
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
