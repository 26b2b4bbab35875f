"""Models: create, describe, load, unload."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from rlsys.serve.routes.common import answer, body_as, front_of, promised, tenant_of
from rlsys.serve.wire.requests import CreateModel, LoadWeights, ModelOnly, WeightsInfo

router = APIRouter(prefix="/api/v1")


@router.post("/create_model")
async def create_model(request: Request) -> Response:
    body = await body_as(CreateModel, request)
    return promised(await front_of(request).controller.create_model(tenant_of(request), body))


@router.post("/load_weights")
async def load_weights(request: Request) -> Response:
    body = await body_as(LoadWeights, request)
    return promised(await front_of(request).controller.load_weights(tenant_of(request), body))


@router.post("/unload_model")
async def unload_model(request: Request) -> Response:
    body = await body_as(ModelOnly, request)
    return promised(await front_of(request).controller.unload_model(tenant_of(request), body.model_id))


@router.post("/get_info")
async def get_info(request: Request) -> Response:
    """`model_name` is the name that the client gave, from which it loads its tokenizer."""
    body, front = await body_as(ModelOnly, request), front_of(request)
    return answer(await front.controller.describe_model(tenant_of(request), body.model_id, front.limits.poll_s))


@router.post("/weights_info")
async def weights_info(request: Request) -> Response:
    body = await body_as(WeightsInfo, request)
    return answer(await front_of(request).controller.describe_weights(tenant_of(request), body.tinker_path))
