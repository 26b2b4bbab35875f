"""Routes of /v1: models, completions, chat completions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Send

from rlsys.answer_parts import AnswerParts, CompletionPart, PartsRequest
from rlsys.errors import RlsysError
from rlsys.serve.backend import Base
from rlsys.serve.errors import Refusal, answer_of, failure_of, referenced
from rlsys.serve.front import Front
from rlsys.serve.openai.answers import ChatWriter, CompletionWriter, Json, joined
from rlsys.serve.openai.door import ModelCard
from rlsys.serve.openai.errors import DoorRefusal, error_value
from rlsys.serve.openai.prompts import chat_prompts, chat_requests, completion_prompts, completion_requests
from rlsys.serve.openai.requests import ChatBody, CompletionBody, SampledBody, read_body
from rlsys.serve.openai.text import TextCodec
from rlsys.serve.operator.access import reference_of
from rlsys.serve.routes.common import answer, front_of, tenant_of
from rlsys.serve.wire.results import json_bytes

log = logging.getLogger("rlsys.serve")
router = APIRouter(prefix="/v1")
T = TypeVar("T")
CLIENT_GONE = 499  # nobody reads it; the access log does
_NO_TOKENS = slice(0, 0)


@dataclass(frozen=True, slots=True)
class _Call:
    """One request for completions, checked and encoded."""

    tenant: str
    model: str
    requests: Sequence[PartsRequest]
    writer: CompletionWriter | ChatWriter
    n: int


@router.get("/models")
async def list_models(request: Request) -> Response:
    async def work() -> Response:
        cards = await front_of(request).controller.model_cards(tenant_of(request))
        return answer({"object": "list", "data": [_card(card) for card in cards]})

    return await _answered(request, work())


@router.get("/models/{model:path}")
async def get_model(model: str, request: Request) -> Response:
    async def work() -> Response:
        return answer(_card(await front_of(request).controller.model_card(tenant_of(request), model)))

    return await _answered(request, work())


@router.post("/completions")
async def completions(request: Request) -> Response:
    async def work() -> Response:
        body = read_body(CompletionBody, await request.body())
        front, base, codec = await _model(request, body.model)
        prompts = await front.in_thread(completion_prompts, body, codec)
        requests = completion_requests(body, prompts, base, front.limits)
        call = _Call(tenant_of(request), body.model, requests, CompletionWriter(body, codec, prompts), body.n)
        return await _response(request, body, call)

    return await _answered(request, work())


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    async def work() -> Response:
        body = read_body(ChatBody, await request.body())
        front, base, codec = await _model(request, body.model)
        prompts = await front.in_thread(chat_prompts, body, codec)
        requests = chat_requests(body, prompts, base, front.limits)
        call = _Call(tenant_of(request), body.model, requests, ChatWriter(body, codec, prompts), body.n)
        return await _response(request, body, call)

    return await _answered(request, work())


class EventStream(StreamingResponse):
    """Server-sent events. Ends their generator with the connection, so that the engine stops too."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def _response(request: Request, body: SampledBody, call: _Call) -> Response:
    if not body.stream:
        return await _unless_gone(request, _complete(front_of(request), call))
    events = _events(request, call, body.includes_usage)
    try:
        first = await _unless_gone(request, anext(events))  # an error before the first event has its own status
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_chained(first, events))


async def _complete(front: Front, call: _Call) -> Response:
    parts: dict[tuple[int, int], list[CompletionPart]] = {}
    async with aclosing(_parts(front, call)) as arrived:
        async for prompt, part in arrived:
            parts.setdefault((prompt, part.index), []).append(part)
    choices = [call.writer.choice(prompt, joined(each)) for (prompt, _), each in sorted(parts.items())]
    return answer(call.writer.response(choices))


async def _events(request: Request, call: _Call, includes_usage: bool) -> AsyncGenerator[bytes, None]:
    front, is_begun = front_of(request), False
    try:
        async with aclosing(_parts(front, call)) as arrived:
            async for prompt, part in arrived:
                choice = call.writer.chunk(prompt, part)
                if choice is not None:
                    yield _event(call.writer.event([choice]))
                    is_begun = True
        if includes_usage:
            yield _event(call.writer.event([]))
    except (Refusal, RlsysError) as error:
        if not is_begun:
            raise
        _, value = _error(request, error)
        yield _event(value)
    yield b"data: [DONE]\n\n"


async def _parts(front: Front, call: _Call) -> AsyncGenerator[tuple[int, CompletionPart], None]:
    """Parts of all completions, with the index of their prompt."""
    async with aclosing(front.controller.answer_parts(call.tenant, call.model, call.requests)) as arrived:
        async for prompt, found in arrived:
            if found.prompt is not None:
                call.writer.scores[prompt] = found.prompt
            for part in found.completions if call.requests[prompt].n else _empty(found, call.n):
                yield prompt, part


def _empty(scored: AnswerParts, n: int) -> list[CompletionPart]:
    """Completions without a token, for a prompt that is only scored."""
    assert scored.prompt is not None
    none, row = scored.prompt.logprobs[_NO_TOKENS], scored.prompt
    tops = row.topk_tokens[_NO_TOKENS], row.topk_logprobs[_NO_TOKENS]
    return [CompletionPart(index, "", none.astype("int32"), none, *tops, "length") for index in range(n)]


async def _chained(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        DoorRefusal: the client left.
    """
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([doing, leaving], return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise DoorRefusal("the client left", status=CLIENT_GONE)
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answered(request: Request, work: Awaitable[Response]) -> Response:
    """The answer, or an error in OpenAI's form."""
    try:
        return await work
    except (Refusal, RlsysError) as error:
        status, value = _error(request, error)
        return answer(value, status, error.headers if isinstance(error, Refusal) else answer_of(error)[1])


def _error(request: Request, error: Refusal | RlsysError) -> tuple[int, Json]:
    """Status and JSON of an error. One of the server's names a reference to its log."""
    if isinstance(error, DoorRefusal):
        return error.status, error_value(error.status, error.detail, error.param, error.code)
    if isinstance(error, Refusal):
        return error.status, error_value(error.status, error.detail)
    failure = failure_of(error, {base.about.folder: base.name for base in front_of(request).bases.values()})
    if failure.category == "user":
        return 400, error_value(400, failure.error)
    reference = reference_of(request.scope)
    log.error("%s: reference %s: %s: %s", request.url.path, reference, type(error).__name__, error)
    status, _ = answer_of(error)
    return status, error_value(status, referenced(failure, reference).error)


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"


def _card(card: ModelCard) -> Json:
    return {
        "id": card.id,
        "object": "model",
        "created": int(card.created.timestamp()),
        "owned_by": card.owner,
        "root": card.base,
        "max_model_len": card.max_length,
    }


async def _model(request: Request, name: str) -> tuple[Front, Base, TextCodec]:
    """The base behind a model's name, and its tokenizer."""
    front, codecs = front_of(request), request.app.state.codecs
    found = await front.controller.find_model(tenant_of(request), name)
    return front, front.bases[found.base_name], codecs[found.base_name]
