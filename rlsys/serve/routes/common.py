"""What all routes share: front and tenant of a request, bodies, answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request, Response

from rlsys.serve.controller import Ticket
from rlsys.serve.front import Front
from rlsys.serve.wire.json_body import WireModel, parse
from rlsys.serve.wire.results import JSON, PROTOBUF, json_bytes

Model = TypeVar("Model", bound=WireModel)
Json = Mapping[str, Any]  # Any: JSON


def front_of(request: Request) -> Front:
    front: Front = request.app.state.front
    return front


def tenant_of(request: Request) -> str:
    tenant: str = request.scope["state"]["tenant"]
    return tenant


async def body_as(kind: type[Model], request: Request) -> Model:
    return parse(kind, await request.body())


def answer(value: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status, headers=dict(headers or {}), media_type=JSON)


def promised(ticket: Ticket) -> Response:
    value: dict[str, Any] = {"request_id": ticket.request_id}
    if ticket.model_id is not None:
        value["model_id"] = ticket.model_id
    if ticket.sample_sequence_ids is not None:
        value["sample_sequence_ids"] = list(ticket.sample_sequence_ids)
    return answer(value)


def wants_protobuf(request: Request) -> bool:
    return PROTOBUF in request.headers.get("accept", "")
