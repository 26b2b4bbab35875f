"""Sampling sessions and sample requests. Requests run side by side: the engine batches them."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from rlsys.client.backend import SampleAnswer
from rlsys.errors import ActorDiedError, CheckpointError, ConfigError, DataLostError, RlsysError, SamplingError
from rlsys.serve import rows, sessions
from rlsys.serve.backend import SampleRequest
from rlsys.serve.creation import base_of
from rlsys.serve.errors import Refusal, bad_request, failure_of
from rlsys.serve.paths import parse_path
from rlsys.serve.promises import Promise
from rlsys.serve.state import Sampler, State
from rlsys.serve.wire.json_body import is_text
from rlsys.serve.wire.requests import Asample, CreateSamplingSession, SamplingBody
from rlsys.serve.wire.results import UNDEFINED_LOGPROB, Result, SampleResult
from rlsys.types import Array, SamplingParams

RECOVER_POLL_S = 0.5
LOWEST_TEMPERATURE = 0.01  # vLLM's lowest above greedy; it raises smaller ones to this


async def create_sampling_session(state: State, tenant: str, body: CreateSamplingSession) -> Sampler:
    """A session on a base or a saved checkpoint. The same numbers give the same session.

    Raises:
        Refusal: 400: no such base or checkpoint, or it cannot be served.
    """
    session = state.session(body.session_id, tenant)
    number = body.sampling_session_seq_id
    known = session.samplers.get(number)
    if known is not None:
        return known
    sampler_id = f"{session.id}:sample:{number}"
    if body.model_path is None:
        if body.base_model is None:
            raise bad_request("create_sampling_session: found neither base_model nor model_path; wanted one of them")
        base = state.base(body.base_model)
        sampler = Sampler(sampler_id, session, base, body.base_model, number, None, None, is_ephemeral=False)
    else:
        sessions.make_room(state, tenant)
        path = parse_path(body.model_path)
        try:
            found = state.store.find(tenant, path)
            base_model = body.base_model or base_of(state, found.tenant, path, found.folder)
            base = state.base(base_model)
            snapshot = await state.backend.open_snapshot(base, found.folder)
        except (CheckpointError, ConfigError) as error:
            raise bad_request(_public(state, error, path.text)) from None
        known = session.samplers.get(number)
        if known is not None or session.ended is not None:  # another request was faster, or the client left
            state.backend.release(base, snapshot)
            if known is not None:
                return known
            raise bad_request(f"session: has ended: {session.ended}")
        sampler = Sampler(sampler_id, session, base, base_model, number, snapshot, path.text, is_ephemeral=False)
    sessions.open_sampler(state, sampler)
    return sampler


def sample(state: State, tenant: str, body: Asample) -> Promise:
    """Start one request. The same number gives the same promise."""
    sampler = state.sampler(body.sampling_session_id, tenant)
    known = sampler.requests.get(body.seq_id)
    if known is not None:
        promise = state.promises.known(known[0], tenant, sampler.session.id, None)
        promise.sample_sequence_ids = _sequence_ids(*known)
        return promise
    if sampler.released is not None:
        raise bad_request(f"sampling_session_id: this sampler was released: {sampler.released}")
    request = _checked(state, sampler, body)
    in_flight = state.samples_in_flight[tenant]
    if in_flight + request.n > state.limits.samples_in_flight and in_flight:
        raise Refusal(
            429,
            f"samples: found {in_flight} in flight; wanted at most limits.samples_in_flight = "
            f"{state.limits.samples_in_flight}",
            {"Retry-After": "1"},
        )
    promise = sessions.promise_of(state, sampler.session)
    promise.sample_sequence_ids = _sequence_ids(promise.id, request.n)
    sampler.requests[body.seq_id] = promise.id, request.n
    state.samples_in_flight[tenant] += request.n
    sampler.running += 1
    state.counts["sample_requests"] += 1

    async def answer() -> Result:
        async with state.turns[sampler.base.name].turn(tenant, request.n):
            found = await _sampled(state, sampler, request)
        state.counts["sampled_tokens"] += len(found.tokens)
        return _result(found, request, body.prompt_logprobs_last_n, promise.sample_sequence_ids or ())

    task = state.spawn(state.settle(promise, answer()))
    promise.cancel = task.cancel

    def done(_: object) -> None:
        state.samples_in_flight[tenant] -= request.n
        sampler.running -= 1

    task.add_done_callback(done)
    return promise


async def _sampled(state: State, sampler: Sampler, request: SampleRequest) -> SampleAnswer:
    """While no sampler of the base is alive, the request waits for the one that is being started, up to
    `limits.recover_s`."""
    deadline = time.monotonic() + state.limits.recover_s
    while True:
        snapshot = None
        try:
            await _open(state, sampler)
            snapshot = sampler.snapshot
            return await state.backend.sample(sampler.base, snapshot, request)
        except DataLostError:  # lost with the learner, before a new sampler had loaded it
            if sampler.path is None or time.monotonic() > deadline:
                raise
            if sampler.snapshot is snapshot:
                sampler.snapshot = None  # to be opened again
        except ActorDiedError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RECOVER_POLL_S)


async def _open(state: State, sampler: Sampler) -> None:
    """Open the checkpoint of a sampler whose snapshot was lost with an earlier server."""
    if sampler.snapshot is not None or sampler.path is None or sampler.released is not None:
        return
    if sampler.opening is not None:
        await asyncio.shield(sampler.opening)
        return
    sampler.opening = asyncio.ensure_future(_opened(state, sampler, sampler.path))
    try:
        await asyncio.shield(sampler.opening)
    finally:
        sampler.opening = None


async def _opened(state: State, sampler: Sampler, path: str) -> None:
    found = state.store.find(sampler.session.tenant, parse_path(path))
    snapshot = await state.backend.open_snapshot(sampler.base, found.folder)
    if sampler.released is not None:
        state.backend.release(sampler.base, snapshot)
        return
    sampler.snapshot = snapshot
    rows.note_snapshot(state.database, sampler)


def cancel(state: State, tenant: str, request_id: str) -> None:
    """Stop a sample request. Other operations continue: their effects have an order."""
    promise = state.promises.get(request_id, tenant)
    if promise.sample_sequence_ids is not None:
        promise.cancel()


def _sequence_ids(request_id: str, n: int) -> tuple[str, ...]:
    return tuple(f"{request_id}-{i}" for i in range(n))


def _checked(state: State, sampler: Sampler, body: Asample) -> SampleRequest:
    limits, about = state.limits, sampler.base.about
    if body.topk_sample_logprobs or body.prompt_alt_tokens_k or body.target_prompt_logprobs is not None:
        raise bad_request(
            "asample: topk_sample_logprobs, prompt_alt_tokens_k and target_prompt_logprobs are not served; wanted "
            "0, 0 and none"
        )
    if body.num_samples > limits.num_samples:
        raise bad_request(
            f"num_samples: found {body.num_samples}; wanted 1 to limits.num_samples = {limits.num_samples}"
        )
    if body.topk_prompt_logprobs > limits.topk_prompt_logprobs:
        raise bad_request(
            f"topk_prompt_logprobs: found {body.topk_prompt_logprobs}; wanted 0 to limits.topk_prompt_logprobs = "
            f"{limits.topk_prompt_logprobs}"
        )
    prompt = _prompt(body, about.vocab_size)
    room = about.max_length - len(prompt)
    if room < 1:
        raise bad_request(
            f"prompt: found {len(prompt)} tokens; wanted at most {about.max_length - 1}, one fewer than the context"
        )
    params = _params(body.sampling_params, room, about.vocab_size, limits.stop_strings, limits.stop_string_chars)
    return SampleRequest(prompt, body.num_samples, params, body.prompt_logprobs, body.topk_prompt_logprobs)


def _prompt(body: Asample, vocab_size: int) -> Array:
    tokens: list[int] = []
    for chunk in body.prompt.chunks:
        if chunk.tokens is None:
            raise bad_request(
                f"prompt: found a chunk of type {chunk.type[:40]!r}; wanted chunks of token ids: this server has no "
                "image or audio input"
            )
        tokens += chunk.tokens
    if not tokens:
        raise bad_request("prompt: found no token; wanted at least one")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise bad_request(f"prompt: found ids from {min(tokens)} to {max(tokens)}; wanted 0 to {vocab_size - 1}")
    return np.array(tokens, np.int32)


def _params(body: SamplingBody, room: int, vocab_size: int, most_stops: int, longest_stop: int) -> SamplingParams:
    stops = [body.stop] if isinstance(body.stop, str) else (body.stop or [])
    if len(stops) > most_stops:
        raise bad_request(f"stop: found {len(stops)} conditions; wanted at most limits.stop_strings = {most_stops}")
    for stop in stops:
        if isinstance(stop, str) and not 1 <= len(stop) <= longest_stop:
            raise bad_request(
                f"stop: found a string of {len(stop)} characters; wanted 1 to limits.stop_string_chars = {longest_stop}"
            )
        if isinstance(stop, str) and not is_text(stop):
            raise bad_request(f"stop: found {stop!r}, with half of a character; wanted text that UTF-8 can hold")
        if isinstance(stop, int) and not 0 <= stop < vocab_size:
            raise bad_request(f"stop: found token id {stop}; wanted 0 to {vocab_size - 1}")
    temperature = body.temperature
    try:
        return SamplingParams(
            max_tokens=room if body.max_tokens is None else min(body.max_tokens, room),
            temperature=temperature if temperature == 0 else max(temperature, LOWEST_TEMPERATURE),
            top_p=body.top_p,
            top_k=-1 if body.top_k >= vocab_size else body.top_k,
            seed=body.seed,
            stop=body.stop,
        )
    except SamplingError as error:
        raise bad_request(str(error)) from None


def _result(answer: SampleAnswer, request: SampleRequest, last_n: int | None, ids: tuple[str, ...]) -> SampleResult:
    prompt_logprobs = None
    if answer.prompt_logprobs is not None:
        prompt_logprobs = answer.prompt_logprobs.astype(np.float32)
        prompt_logprobs[0] = np.nan
        if last_n is not None:
            prompt_logprobs[: max(0, len(prompt_logprobs) - last_n)] = np.nan
    topk_tokens = topk_logprobs = None
    if answer.topk_tokens is not None and answer.topk_logprobs is not None:
        first = np.zeros((1, request.topk))
        topk_tokens = np.concatenate([first.astype(np.int32), answer.topk_tokens])
        topk_logprobs = np.concatenate([(first + UNDEFINED_LOGPROB).astype(np.float32), answer.topk_logprobs])
    return SampleResult(
        answer.tokens,
        answer.logprobs,
        answer.offsets,
        answer.stop_reasons,
        prompt_logprobs,
        topk_tokens,
        topk_logprobs,
        ids,
    )


def _public(state: State, error: RlsysError, path: str) -> str:
    text = failure_of(error, state.names()).error
    return text if path in text else f"{path}: {text}"
