"""Training calls: forward, forward_backward, optim_step, saves."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from rlsys.serve import training
from rlsys.serve.backend import Base
from rlsys.serve.config import Limits
from rlsys.serve.errors import Refusal
from rlsys.serve.routes.common import body_as, promised, state_of, tenant_of
from rlsys.serve.wire import passes
from rlsys.serve.wire.requests import OptimStep, SaveWeights
from rlsys.serve.wire.results import PROTOBUF

router = APIRouter(prefix="/api/v1")


@router.post("/forward_backward")
async def forward_backward(request: Request) -> Response:
    return await _pass(request, forward_only=False)


@router.post("/forward")
async def forward(request: Request) -> Response:
    return await _pass(request, forward_only=True)


@router.post("/optim_step")
async def optim_step(request: Request) -> Response:
    body = await body_as(OptimStep, request)
    return promised(training.optim_step(state_of(request), tenant_of(request), body))


@router.post("/save_weights")
async def save_weights(request: Request) -> Response:
    body = await body_as(SaveWeights, request)
    return promised(training.save(state_of(request), tenant_of(request), body, "weights"))


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request) -> Response:
    body = await body_as(SaveWeights, request)
    return promised(training.save(state_of(request), tenant_of(request), body, "sampler_weights"))


@router.post("/save_weights_external")
async def save_weights_external(request: Request) -> Response:
    body = await body_as(SaveWeights, request)
    return promised(training.save(state_of(request), tenant_of(request), body, "external_weights"))


async def _pass(request: Request, forward_only: bool) -> Response:
    """Decode, check and enter a pass. Once its number is known, a refused one uses it up."""
    state, tenant, body = state_of(request), tenant_of(request), await request.body()
    headers = request.headers
    is_protobuf = headers.get("content-type", "").partition(";")[0].strip().lower() == PROTOBUF
    encoding = headers.get("content-encoding", "").strip().lower()
    decoded = await state.in_thread(_decode, body, encoding, is_protobuf, forward_only, state.limits)
    model, known = training.entering(state, tenant, decoded.model_id, decoded.seq_id)
    if known is not None:
        return promised(known)
    try:
        prepared = await state.in_thread(_prepare, decoded, model.base, state.limits)
    except Refusal as refusal:
        raise training.refused(model, decoded.seq_id, refusal.detail, not decoded.forward_only) from None
    await state.promises.wait(model.created, state.limits.poll_s)
    return promised(training.run_pass(state, model, decoded, prepared))


def _decode(body: bytes, encoding: str, is_protobuf: bool, forward_only: bool, limits: Limits) -> passes.PassRequest:
    content = passes.decompress(body, encoding, limits.decompressed_bytes)
    return passes.read_protobuf(content) if is_protobuf else passes.read_json(content, forward_only)


def _prepare(decoded: passes.PassRequest, base: Base, limits: Limits) -> passes.PreparedPass:
    return passes.prepare(
        decoded, vocab_size=base.about.vocab_size, max_length=base.about.max_length, max_datums=limits.datums
    )
