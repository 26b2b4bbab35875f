"""Sampling sessions and sample requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from rlsys.serve import sampling
from rlsys.serve.routes.common import answer, body_as, promised, state_of, tenant_of
from rlsys.serve.wire.requests import Asample, CancelFuture, CreateSamplingSession

router = APIRouter(prefix="/api/v1")


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request) -> Response:
    body = await body_as(CreateSamplingSession, request)
    sampler = await sampling.create_sampling_session(state_of(request), tenant_of(request), body)
    return answer({"type": "create_sampling_session", "sampling_session_id": sampler.id})


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, request: Request) -> Response:
    sampler = state_of(request).sampler(sampler_id, tenant_of(request))
    value: dict[str, Any] = {"sampler_id": sampler.id, "base_model": sampler.base_model}
    if sampler.path is not None:
        value["model_path"] = sampler.path
    return answer(value)


@router.post("/asample")
async def asample(request: Request) -> Response:
    body = await body_as(Asample, request)
    return promised(sampling.sample(state_of(request), tenant_of(request), body))


@router.post("/cancel_future")
async def cancel_future(request: Request) -> Response:
    body = await body_as(CancelFuture, request)
    sampling.cancel(state_of(request), tenant_of(request), body.request_id)
    return answer({})
