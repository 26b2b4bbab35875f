"""What /v1 needs of the controller: models by name, snapshots kept open between requests, and answers in parts.

The only module of this package that knows `State`. Requests are checked and encoded in the HTTP process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from rlsys.answer_parts import AnswerParts, PartsRequest
from rlsys.client.backend import SnapshotHandle
from rlsys.errors import CheckpointError, DataLostError, StalledError
from rlsys.serve.backend import Base
from rlsys.serve.config import Limits
from rlsys.serve.creation import base_of
from rlsys.serve.errors import Refusal
from rlsys.serve.openai.errors import DoorRefusal, model_not_found
from rlsys.serve.paths import parse_path
from rlsys.serve.state import State

PUBLISHED = "published"  # owner of another tenant's checkpoint


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One name that requests can give as their model."""

    id: str
    created: datetime
    owner: str
    base: str  # name of the base
    max_length: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved sampler checkpoint that a tenant may read. `saved_at` tells two with the same path apart."""

    path: str
    folder: Path
    saved_at: datetime
    is_own: bool  # else published by another


@dataclass(frozen=True, slots=True)
class Found:
    """What a model's name stands for."""

    base_name: str
    checkpoint: Checkpoint | None  # None: the base itself


@dataclass(slots=True, eq=False)
class _Open:
    base: Base
    handle: asyncio.Task[SnapshotHandle]
    users: int = 0
    used: float = field(default_factory=time.monotonic)


_Key = tuple[str, str, datetime]  # tenant, path, time of the save
_Arrival = tuple[int, AnswerParts] | BaseException | None  # of the request with this index; None: one has ended


class Door:
    """Snapshots are opened by the first request and released after `limits.openai_snapshot_idle_s`."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._open: dict[_Key, _Open] = {}
        self._running: set[asyncio.Task[None]] = set()  # requests in the engine

    @property
    def limits(self) -> Limits:
        return self._state.limits

    def models(self, tenant: str) -> list[ModelCard]:
        """Bases and aliases, then sampler checkpoints of the tenant and published ones. Reads the disk."""
        state = self._state
        names = [(base, name) for base in state.backend.bases.values() for name in (base.name, *base.aliases)]
        cards = [ModelCard(name, state.started_at, "rlsys", base.name, base.about.max_length) for base, name in names]
        for each in state.store.readable(tenant):
            if each.path.kind != "sampler_weights":
                continue
            try:
                base = state.base(base_of(state, each.tenant, each.path, each.folder))
            except (Refusal, CheckpointError):  # of a base that is not served, or damaged
                continue
            owner = tenant if each.tenant == tenant else PUBLISHED
            cards.append(ModelCard(each.path.text, each.record.time, owner, base.name, base.about.max_length))
        return cards

    def card(self, tenant: str, model: str) -> ModelCard:
        """
        Raises:
            DoorRefusal: 404: the tenant has no such model.
        """
        found = self.find(tenant, model)
        created = self._state.started_at if found.checkpoint is None else found.checkpoint.saved_at
        owner = "rlsys" if found.checkpoint is None else tenant if found.checkpoint.is_own else PUBLISHED
        base = self._state.base(found.base_name)
        return ModelCard(model, created, owner, base.name, base.about.max_length)

    def find(self, tenant: str, model: str) -> Found:
        """
        Raises:
            DoorRefusal: 404: no base, alias or checkpoint that the tenant may read. 400: a training checkpoint.
        """
        state = self._state
        for base in state.backend.bases.values():
            if model in (base.name, *base.aliases):
                return Found(base.name, None)
        try:
            path = parse_path(model)
            found = state.store.find(tenant, path)
            base_name = base_of(state, found.tenant, path, found.folder)
        except (Refusal, CheckpointError):
            raise model_not_found(model) from None
        if path.kind != "sampler_weights":
            raise DoorRefusal(
                f"model: {path.text} is a {path.kind} checkpoint; wanted one of save_weights_for_sampler", "model"
            )
        try:
            base = state.base(base_name)
        except Refusal:
            raise DoorRefusal(
                f"model: {path.text} was trained on {base_name!r}, which this server does not serve", "model"
            ) from None
        checkpoint = Checkpoint(path.text, found.folder, found.record.time, found.tenant == tenant)
        return Found(base.name, checkpoint)

    @asynccontextmanager
    async def _using(self, tenant: str, found: Found) -> AsyncIterator[SnapshotHandle | None]:
        """The snapshot of a checkpoint, which stays open inside the block; None: the base.

        Raises:
            DoorRefusal: 429: the tenant's open snapshots are all in use.
            RlsysError: the checkpoint cannot be served.
        """
        checkpoint = found.checkpoint
        if checkpoint is None:
            yield None
            return
        key = (tenant, checkpoint.path, checkpoint.saved_at)
        entry = self._open.get(key)
        if entry is None:
            self._make_room(tenant)
            base = self._state.base(found.base_name)
            opening = asyncio.ensure_future(self._state.backend.open_snapshot(base, checkpoint.folder))
            entry = self._open[key] = _Open(base, opening)
        entry.users += 1
        try:
            yield await asyncio.shield(entry.handle)  # several requests wait for one opening, so none cancels it
        except Refusal:
            raise
        except Exception:  # of the opening, or of samplers that lost it: the next request opens it again
            if self._open.get(key) is entry:
                self._release(key)
            raise
        finally:
            entry.users -= 1
            entry.used = time.monotonic()

    async def answer(
        self, tenant: str, model: str, requests: Sequence[PartsRequest]
    ) -> AsyncGenerator[tuple[int, AnswerParts], None]:
        """Parts of several requests as they come, with the index of each one's request. Closing the generator aborts
        the requests in the engine.

        Raises:
            DoorRefusal: as `find`; 429: too many samples or open snapshots of this tenant are in use.
            RlsysError: the checkpoint cannot be served, or the engine failed.
        """
        found, may_repeat = self.find(tenant, model), True
        while True:
            try:
                async with (
                    self._using(tenant, found) as snapshot,
                    aclosing(self._answer(tenant, self._state.base(found.base_name), snapshot, requests)) as arrived,
                ):
                    async for arrival in arrived:
                        may_repeat = False
                        yield arrival
                return
            except DataLostError:  # a learner died before a sampler had loaded the snapshot: it is opened again
                if not may_repeat or found.checkpoint is None:
                    raise
                may_repeat = False

    async def _answer(
        self, tenant: str, base: Base, snapshot: SnapshotHandle | None, requests: Sequence[PartsRequest]
    ) -> AsyncGenerator[tuple[int, AnswerParts], None]:
        state = self._state
        count = sum(max(request.n, 1) for request in requests)
        in_flight = state.samples_in_flight[tenant]
        if in_flight and in_flight + count > state.limits.samples_in_flight:
            raise DoorRefusal(
                f"samples: found {in_flight} in flight; wanted at most limits.samples_in_flight = "
                f"{state.limits.samples_in_flight}",
                status=429,
                headers={"Retry-After": "1"},
            )
        state.counts["sample_requests"] += len(requests)
        arrived = asyncio.Queue[_Arrival]()
        tasks = [
            self._started(tenant, index, base, snapshot, request, arrived) for index, request in enumerate(requests)
        ]
        running = len(tasks)
        try:
            while running:
                arrival = await arrived.get()
                if arrival is None:
                    running -= 1
                elif isinstance(arrival, BaseException):
                    raise arrival
                else:
                    yield arrival
        finally:
            for task in tasks:  # not awaited: what cancels the reader may cancel each of its awaits
                task.cancel()

    def sweep(self) -> None:
        """Release snapshots that nobody has used for `limits.openai_snapshot_idle_s`."""
        limit = time.monotonic() - self.limits.openai_snapshot_idle_s
        for key, entry in list(self._open.items()):
            if not entry.users and entry.used < limit:
                self._release(key)

    def abort(self) -> None:
        """Abort all requests in the engine: the process that read their answers is dead."""
        for task in list(self._running):
            task.cancel()

    def close(self) -> None:
        for key in list(self._open):
            self._release(key)

    def _make_room(self, tenant: str) -> None:
        mine = [key for key in self._open if key[0] == tenant]
        if len(mine) < self.limits.openai_snapshots:
            return
        idle = [key for key in mine if not self._open[key].users]
        if not idle:
            raise DoorRefusal(
                f"model: found {len(mine)} checkpoints of this tenant in use at once; wanted at most "
                f"limits.openai_snapshots = {self.limits.openai_snapshots}",
                "model",
                429,
                headers={"Retry-After": "1"},
            )
        self._release(min(idle, key=lambda key: self._open[key].used))

    def _release(self, key: _Key) -> None:
        entry = self._open.pop(key)

        def release(opened: asyncio.Task[SnapshotHandle]) -> None:
            if not opened.cancelled() and opened.exception() is None:
                self._state.backend.release(entry.base, opened.result())

        entry.handle.add_done_callback(release)

    def _started(
        self,
        tenant: str,
        index: int,
        base: Base,
        snapshot: SnapshotHandle | None,
        request: PartsRequest,
        arrived: asyncio.Queue[_Arrival],
    ) -> asyncio.Task[None]:
        """A task of the server, which waits for it at its end. Its samples are in flight until it has ended."""
        count, in_flight = max(request.n, 1), self._state.samples_in_flight
        in_flight[tenant] += count
        task = self._state.spawn(self._pass_on(tenant, index, base, snapshot, request, arrived))

        self._running.add(task)

        def ended(_: object) -> None:
            self._running.discard(task)
            in_flight[tenant] -= count

        task.add_done_callback(ended)
        return task

    async def _pass_on(
        self,
        tenant: str,
        index: int,
        base: Base,
        snapshot: SnapshotHandle | None,
        request: PartsRequest,
        arrived: asyncio.Queue[_Arrival],
    ) -> None:
        try:
            async with (
                self._state.turns[base.name].turn(tenant, max(request.n, 1)),
                aclosing(self._state.backend.parts(base, snapshot, request)) as answers,
            ):
                async for answer in answers:
                    self._state.counts["sampled_tokens"] += sum(len(part.tokens) for part in answer.completions)
                    arrived.put_nowait((index, answer))
        except asyncio.CancelledError:  # by the reader, which does not read on, or without one, or at the server's end
            arrived.put_nowait(StalledError("the server is stopping"))
            raise
        except Exception as error:  # the reader raises it
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)
