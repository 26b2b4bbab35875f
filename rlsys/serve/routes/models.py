"""Models: create, describe, load, unload."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from rlsys.errors import CheckpointError
from rlsys.learner.checkpoint_files import read_info
from rlsys.serve import training
from rlsys.serve.errors import Refusal
from rlsys.serve.paths import parse_path
from rlsys.serve.routes.common import Json, answer, body_as, promised, state_of, tenant_of
from rlsys.serve.state import State
from rlsys.serve.wire.requests import CreateModel, LoadWeights, ModelOnly, WeightsInfo

router = APIRouter(prefix="/api/v1")


@router.post("/create_model")
async def create_model(request: Request) -> Response:
    body = await body_as(CreateModel, request)
    return promised(training.create_model(state_of(request), tenant_of(request), body))


@router.post("/load_weights")
async def load_weights(request: Request) -> Response:
    body = await body_as(LoadWeights, request)
    return promised(training.load_weights(state_of(request), tenant_of(request), body))


@router.post("/unload_model")
async def unload_model(request: Request) -> Response:
    body = await body_as(ModelOnly, request)
    return promised(training.unload_model(state_of(request), tenant_of(request), body.model_id))


@router.post("/get_info")
async def get_info(request: Request) -> Response:
    """`model_name` is the name that the client gave, from which it loads its tokenizer."""
    body = await body_as(ModelOnly, request)
    state, tenant = state_of(request), tenant_of(request)
    model = state.model(body.model_id, tenant)
    await state.promises.wait(model.created, state.limits.poll_s)
    if model.lora is None:
        raise Refusal(400, f"model {model.id!r}: is not created")
    data = {"arch": model.base.about.arch, "model_name": model.base_model}
    if model.base.tokenizer is not None:
        data["tokenizer_id"] = model.base.tokenizer
    return answer(
        {
            "type": "get_info",
            "model_id": model.id,
            "model_data": data,
            "model_name": model.base_model,
            "is_lora": True,
            "lora_rank": model.lora.rank,
        }
    )


@router.post("/weights_info")
async def weights_info(request: Request) -> Response:
    body = await body_as(WeightsInfo, request)
    return answer(await asyncio.to_thread(_weights_info, state_of(request), tenant_of(request), body.tinker_path))


def _weights_info(state: State, tenant: str, text: str) -> Json:
    path = parse_path(text)
    try:
        found = state.store.find(tenant, path)
        info = read_info(found.folder)
        base_model = training.base_of(state, found.tenant, path, found.folder)
    except CheckpointError as error:
        raise Refusal(404, str(error).replace(str(state.store.root), "(checkpoints)")) from None
    lora = info.lora
    return {
        "base_model": base_model,
        "is_lora": True,
        "lora_rank": lora.rank,
        "train_unembed": lora.train_unembed,
        "train_mlp": lora.train_mlp,
        "train_attn": lora.train_attn,
    }
