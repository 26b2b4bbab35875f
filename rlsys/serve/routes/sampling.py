"""Sampling sessions and sample requests."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from rlsys.serve.routes.common import answer, body_as, front_of, promised, tenant_of
from rlsys.serve.wire.requests import Asample, CancelFuture, CreateSamplingSession

router = APIRouter(prefix="/api/v1")


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request) -> Response:
    body = await body_as(CreateSamplingSession, request)
    sampler_id = await front_of(request).controller.create_sampling_session(tenant_of(request), body)
    return answer({"type": "create_sampling_session", "sampling_session_id": sampler_id})


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, request: Request) -> Response:
    return answer(await front_of(request).controller.describe_sampler(tenant_of(request), sampler_id))


@router.post("/asample")
async def asample(request: Request) -> Response:
    body = await body_as(Asample, request)
    return promised(await front_of(request).controller.sample(tenant_of(request), body))


@router.post("/cancel_future")
async def cancel_future(request: Request) -> Response:
    body = await body_as(CancelFuture, request)
    await front_of(request).controller.cancel(tenant_of(request), body.request_id)
    return answer({})
