"""Long polls for results."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from rlsys.serve.routes.common import answer, body_as, front_of, tenant_of, wants_protobuf
from rlsys.serve.wire.requests import RetrieveFuture

router = APIRouter(prefix="/api/v1")
LARGE = 256 * 1024  # bytes of a result that is encoded beside the event loop


@router.post("/retrieve_future")
async def retrieve_future(request: Request) -> Response:
    """Hold the request until there is a result. 408 is the answer after which clients ask again at once, silently."""
    body, front = await body_as(RetrieveFuture, request), front_of(request)
    settled = await front.controller.poll(tenant_of(request), body.request_id, front.limits.poll_s)
    result = settled.result
    if result is None:
        value = {"detail": "not ready; ask again", "queue_state": "active"}
        if settled.reason is not None:
            value["queue_state_reason"] = settled.reason
        return answer(value, 408)
    protobuf = wants_protobuf(request)
    if result.nbytes > LARGE:
        encoded = await front.in_thread(result.encode, protobuf)
    else:
        encoded = result.encode(protobuf)
    return Response(encoded.body, media_type=encoded.media_type)
