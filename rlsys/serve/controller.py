"""Calls of the service, as the HTTP layer makes them. They run in one event loop on one `State`.

A named Ray actor holds it, so an HTTP process can end, and another start, without a loss.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from rlsys.answer_parts import AnswerParts, PartsRequest
from rlsys.errors import CheckpointError
from rlsys.learner.checkpoint_files import read_info
from rlsys.serve import creation, listings, recovery, sampling, sessions, training, upkeep
from rlsys.serve.backend import Base
from rlsys.serve.checkpoints import Checkpoint
from rlsys.serve.errors import NumberedRefusal, Refusal, failure_of, not_found
from rlsys.serve.openai.door import Door, Found, ModelCard
from rlsys.serve.operator.figures import Figures, StatusLine, deployment_states, figures
from rlsys.serve.paths import CheckpointPath, Kind, parse_path
from rlsys.serve.promises import Promise
from rlsys.serve.state import State, now
from rlsys.serve.wire.passes import PreparedPass
from rlsys.serve.wire.requests import (
    Asample,
    CreateModel,
    CreateSamplingSession,
    CreateSession,
    LoadWeights,
    OptimStep,
    SaveWeights,
    SearchSessions,
)
from rlsys.serve.wire.results import Result

SWEEP_S = 1.0
SEEN_S = 10.0
EXPIRY_S = 30.0
Json = dict[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class Ticket:
    """A promise, as its client gets it."""

    request_id: str
    model_id: str | None
    sample_sequence_ids: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Settled:
    """Answer to a poll. `result` None: not ready; `reason`: what the operation waits for."""

    result: Result | None
    reason: str | None = None


class Controller:
    """Methods raise `Refusal` for what is refused, and an RlsysError for what failed."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._tasks: list[asyncio.Task[None]] = []
        self._status = StatusLine(figures(state))
        self.door = Door(state)

    async def start(self) -> None:
        """Take over what an earlier controller left, then begin the periodic work."""
        await recovery.recover(self.state)
        state = self.state
        upkeep.reserve(state)
        self._tasks = [
            asyncio.create_task(upkeep.every(SWEEP_S, lambda: upkeep.sweep(state))),
            asyncio.create_task(upkeep.every(SWEEP_S, self.door.sweep)),
            asyncio.create_task(upkeep.every(SEEN_S, lambda: sessions.note_seen(state))),
            asyncio.create_task(upkeep.every_in_thread(EXPIRY_S, lambda: upkeep.remove_expired(state))),
            asyncio.create_task(upkeep.every_in_thread(EXPIRY_S, lambda: upkeep.reserve(state))),
        ]

    async def stop(self) -> None:
        """Refuse new work, let running work finish, then write models to disk. Can be called twice."""
        for task in self._tasks:
            task.cancel()
        await upkeep.stop_work(self.state)
        self.door.close()

    async def status_line(self) -> str | None:
        return self._status.text(figures(self.state))

    async def bases(self) -> Sequence[Base]:
        return list(self.state.backend.bases.values())

    async def begin_front(self) -> None:
        """An HTTP process begins: there is one at a time, so no other reads the answers that run. Results of promises
        are kept, for clients ask for them again."""
        self.door.abort()

    async def signing_secret(self, new: str) -> str:
        """The secret of signed addresses and keys; `new` is kept if there was none."""
        return self.state.database.setting("signing_secret", new)

    # sessions

    async def create_session(self, tenant: str, body: CreateSession) -> str:
        self._refuse_at_end()
        return sessions.create_session(self.state, tenant, body).id

    async def heartbeat(self, tenant: str, session_id: str) -> None:
        sessions.heartbeat(self.state, tenant, session_id)

    async def finish_session(self, tenant: str, session_id: str, reason: str) -> None:
        session = self.state.session(session_id, tenant)
        session.finish_reason = reason
        sessions.finish(self.state, session, f"its client finished it ({reason})")

    async def session_ids(self, tenant: str) -> list[str]:
        return [each.id for each in listings.sessions_of(self.state, tenant)]

    async def describe_session(self, tenant: str, session_id: str) -> Json:
        return listings.describe_session(self.state, tenant, session_id)

    async def search_sessions(self, tenant: str, body: SearchSessions) -> Json:
        return listings.search_sessions(self.state, tenant, body)

    # models

    async def create_model(self, tenant: str, body: CreateModel) -> Ticket:
        self._refuse_at_end()
        return _ticket(creation.create_model(self.state, tenant, body))

    async def load_weights(self, tenant: str, body: LoadWeights) -> Ticket:
        self._refuse_at_end()
        return _ticket(creation.load_weights(self.state, tenant, body))

    async def unload_model(self, tenant: str, model_id: str) -> Ticket:
        return _ticket(training.unload_model(self.state, tenant, model_id))

    async def describe_model(self, tenant: str, model_id: str, limit_s: float) -> Json:
        model = self.state.model(model_id, tenant)
        await self.state.promises.wait(model.created, limit_s)
        if model.lora is None:
            raise Refusal(400, f"model {model.id!r}: is not created")
        data = {"arch": model.base.about.arch, "model_name": model.base_model}
        if model.base.tokenizer is not None:
            data["tokenizer_id"] = model.base.tokenizer
        return {
            "type": "get_info",
            "model_id": model.id,
            "model_data": data,
            "model_name": model.base_model,
            "is_lora": True,
            "lora_rank": model.lora.rank,
        }

    async def base_of_model(self, tenant: str, model_id: str, seq: int) -> str | Ticket:
        """Name of a model's base, or the ticket of its call `seq` if that came before."""
        model, known = training.entering(self.state, tenant, model_id, seq)
        return model.base.name if known is None else _ticket(known)

    async def run_pass(
        self, tenant: str, model_id: str, seq: int, forward_only: bool, prepared: PreparedPass, limit_s: float
    ) -> Ticket:
        self._refuse_at_end()
        model, known = training.entering(self.state, tenant, model_id, seq)
        if known is not None:
            return _ticket(known)
        await self.state.promises.wait(model.created, limit_s)
        return _ticket(training.run_pass(self.state, model, seq, forward_only, prepared))

    async def use_up(self, tenant: str, refusal: NumberedRefusal) -> None:
        training.use_up(self.state, tenant, refusal)

    async def optim_step(self, tenant: str, body: OptimStep) -> Ticket:
        self._refuse_at_end()
        return _ticket(training.optim_step(self.state, tenant, body))

    async def save(self, tenant: str, body: SaveWeights, kind: Kind) -> Ticket:
        self._refuse_at_end()
        return _ticket(training.save(self.state, tenant, body, kind))

    # samplers

    async def create_sampling_session(self, tenant: str, body: CreateSamplingSession) -> str:
        self._refuse_at_end()
        return (await sampling.create_sampling_session(self.state, tenant, body)).id

    async def describe_sampler(self, tenant: str, sampler_id: str) -> Json:
        sampler = self.state.sampler(sampler_id, tenant)
        value: Json = {"sampler_id": sampler.id, "base_model": sampler.base_model}
        if sampler.path is not None:
            value["model_path"] = sampler.path
        return value

    async def sample(self, tenant: str, body: Asample) -> Ticket:
        self._refuse_at_end()
        return _ticket(sampling.sample(self.state, tenant, body))

    async def cancel(self, tenant: str, request_id: str) -> None:
        sampling.cancel(self.state, tenant, request_id)

    async def poll(self, tenant: str, request_id: str, limit_s: float) -> Settled:
        promise = self.state.promises.get(request_id, tenant)
        reason = promise.queue_reason()
        found = await self.state.promises.wait(promise, limit_s)
        self.state.hear(promise.session_id)
        return Settled(found, reason)

    # OpenAI's API

    async def find_model(self, tenant: str, name: str) -> Found:
        return self.door.find(tenant, name)

    async def model_card(self, tenant: str, name: str) -> ModelCard:
        return self.door.card(tenant, name)

    async def model_cards(self, tenant: str) -> list[ModelCard]:
        return await asyncio.to_thread(self.door.models, tenant)

    def answer_parts(
        self, tenant: str, model: str, requests: Sequence[PartsRequest]
    ) -> AsyncGenerator[tuple[int, AnswerParts], None]:
        """See `Door.answer`."""
        self._refuse_at_end()
        return self.door.answer(tenant, model, requests)

    # the operator's side

    async def figures(self) -> Figures:
        return figures(self.state)

    async def deployment_states(self) -> dict[str, str]:
        return await deployment_states(self.state.backend)

    # checkpoints

    async def readable(self, tenant: str, path: CheckpointPath) -> Checkpoint:
        """An own or a published checkpoint. Raises Refusal 404."""
        try:
            return self.state.store.find(tenant, path)
        except CheckpointError as error:
            raise Refusal(404, str(error)) from None

    async def own_checkpoint(self, tenant: str, path: CheckpointPath) -> Checkpoint:
        return self.state.store.own(tenant, path)

    async def describe_weights(self, tenant: str, text: str) -> Json:
        return await asyncio.to_thread(_describe_weights, self.state, tenant, parse_path(text))

    async def delete_checkpoint(self, tenant: str, path: CheckpointPath) -> None:
        await asyncio.to_thread(upkeep.delete, self.state, self.state.store.own(tenant, path))

    async def publish(self, tenant: str, path: CheckpointPath, public: bool) -> None:
        self._update(tenant, path, {"public": public})

    async def set_ttl(self, tenant: str, path: CheckpointPath, ttl_seconds: float | None) -> None:
        expires: datetime | None = None if ttl_seconds is None else now() + timedelta(seconds=ttl_seconds)
        self._update(tenant, path, {"expires_at": expires})

    async def runs(self, tenant: str, limit: int, offset: int) -> Json:
        return await asyncio.to_thread(listings.runs, self.state, tenant, limit, offset)

    async def describe_run(self, tenant: str, run_id: str) -> Json:
        run = self.state.store.run(tenant, run_id)
        if run is None:
            raise not_found("training run", run_id[:100])
        return await asyncio.to_thread(listings.describe_run, self.state, tenant, run)

    async def checkpoints(self, tenant: str, run_id: str | None, with_external: bool) -> list[Json]:
        if run_id is not None and self.state.store.run(tenant, run_id) is None:
            raise not_found("training run", run_id[:100])
        return await asyncio.to_thread(listings.checkpoints, self.state, tenant, run_id, with_external)

    def _update(self, tenant: str, path: CheckpointPath, update: Json) -> None:
        found = self.state.store.own(tenant, path)
        self.state.store.put_record(tenant, path, found.record.model_copy(update=update))

    def _refuse_at_end(self) -> None:
        if self.state.closing:
            raise Refusal(503, "the server is stopping", {"Retry-After": "5"})


def _ticket(promise: Promise) -> Ticket:
    return Ticket(promise.id, promise.model_id, promise.sample_sequence_ids)


def _describe_weights(state: State, tenant: str, path: CheckpointPath) -> Json:
    try:
        found = state.store.find(tenant, path)
        info = read_info(found.folder)
        base_model = creation.base_of(state, found.tenant, path, found.folder)
    except CheckpointError as error:
        raise Refusal(404, failure_of(error, state.names()).error) from None
    lora = info.lora
    return {
        "base_model": base_model,
        "is_lora": True,
        "lora_rank": lora.rank,
        "train_unembed": lora.train_unembed,
        "train_mlp": lora.train_mlp,
        "train_attn": lora.train_attn,
    }
