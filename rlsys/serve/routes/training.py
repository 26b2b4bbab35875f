"""Training calls: forward, forward_backward, optim_step, saves."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from rlsys.serve.backend import Base
from rlsys.serve.config import Limits
from rlsys.serve.controller import Ticket
from rlsys.serve.errors import NumberedRefusal, Refusal
from rlsys.serve.routes.common import body_as, front_of, promised, tenant_of
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
    return promised(await front_of(request).controller.optim_step(tenant_of(request), body))


@router.post("/save_weights")
async def save_weights(request: Request) -> Response:
    body = await body_as(SaveWeights, request)
    return promised(await front_of(request).controller.save(tenant_of(request), body, "weights"))


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request) -> Response:
    body = await body_as(SaveWeights, request)
    return promised(await front_of(request).controller.save(tenant_of(request), body, "sampler_weights"))


@router.post("/save_weights_external")
async def save_weights_external(request: Request) -> Response:
    body = await body_as(SaveWeights, request)
    return promised(await front_of(request).controller.save(tenant_of(request), body, "external_weights"))


async def _pass(request: Request, forward_only: bool) -> Response:
    """Decode, check and enter a pass. Once its number is known, a refused one uses it up."""
    front, tenant, body = front_of(request), tenant_of(request), await request.body()
    controller, limits, headers = front.controller, front.limits, request.headers
    is_protobuf = headers.get("content-type", "").partition(";")[0].strip().lower() == PROTOBUF
    encoding = headers.get("content-encoding", "").strip().lower()
    decoded = await front.in_thread(_decode, body, encoding, is_protobuf, forward_only, limits)
    model_id, seq, without_gradient = decoded.model_id, decoded.seq_id, decoded.forward_only
    base = await controller.base_of_model(tenant, model_id, seq)
    if isinstance(base, Ticket):
        return promised(base)
    try:
        prepared = await front.in_thread(_prepare, decoded, front.bases[base], limits)
    except Refusal as refusal:
        raise NumberedRefusal(refusal.detail, model_id, seq, not without_gradient) from None
    return promised(await controller.run_pass(tenant, model_id, seq, without_gradient, prepared, limits.poll_s))


def _decode(body: bytes, encoding: str, is_protobuf: bool, forward_only: bool, limits: Limits) -> passes.PassRequest:
    content = passes.decompress(body, encoding, limits.decompressed_bytes)
    return passes.read_protobuf(content) if is_protobuf else passes.read_json(content, forward_only)


def _prepare(decoded: passes.PassRequest, base: Base, limits: Limits) -> passes.PreparedPass:
    return passes.prepare(
        decoded, vocab_size=base.about.vocab_size, max_length=base.about.max_length, max_datums=limits.datums
    )
