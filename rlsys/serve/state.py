"""What a running server holds in memory: sessions, models, sampling sessions. Lookups check the tenant."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rlsys.client.backend import SnapshotHandle
from rlsys.config import LoraSection
from rlsys.errors import RlsysError
from rlsys.serve.backend import Base, ServeBackend
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.errors import Failure, bad_request, failure_of, not_found, referenced
from rlsys.serve.model_queue import ModelQueue
from rlsys.serve.promises import MemoryPromises, Promise, Promises
from rlsys.serve.sample_turns import SampleTurns
from rlsys.serve.wire.results import FailedResult, Result

log = logging.getLogger("rlsys.serve")
QUEUED = 1.25  # completions that engines are given, of those that they compute at once: none of them runs dry


@dataclass(slots=True, eq=False)
class Session:
    """One run of a client's program. Its models and samplers go when it ends."""

    id: str
    tenant: str
    tags: list[str]
    user_metadata: dict[str, Any]  # Any: the user's JSON
    display_name: str | None
    sdk_version: str
    created_at: datetime
    seen: float  # monotonic seconds of the last request
    models: dict[int, Model] = field(default_factory=dict)
    samplers: dict[int, Sampler] = field(default_factory=dict)
    ended: str | None = None  # why
    finish_reason: str | None = None  # success, errored or interrupted, as its client said


@dataclass(slots=True, eq=False)
class Model:
    """One training run."""

    id: str
    session: Session
    base: Base
    base_model: str  # name under which the client asked
    created: Promise
    number: int  # in its session
    queue: ModelQueue
    lora: LoraSection | None = None  # known once it is created
    last_request: datetime = field(default_factory=lambda: now())
    used: float = field(default_factory=time.monotonic)  # as `last_request`, on a clock that does not jump
    failed_passes: int = 0  # since the last step
    unstepped: int = 0  # passes since the last step: their gradient is on the learner alone
    running: int = 0  # calls that the learner has
    calls: int = 0  # number of the last call that the learner got
    last_done: asyncio.Event | None = None  # of the call that was started last
    parked: Path | None = None  # folder that holds the model instead of the learner; see `rlsys.serve.parking`
    moving: bool = False  # between learner and disk
    held_back: list[Held] = field(default_factory=list)  # calls that wait until it is on the learner


class Held(Protocol):
    """A call that waits for its model to be on the learner."""

    def go(self) -> None: ...
    def fail(self, error: RlsysError) -> None: ...


@dataclass(slots=True, eq=False)
class Sampler:
    """One sampling session: immutable weights, or a base."""

    id: str
    session: Session
    base: Base
    base_model: str
    number: int  # in its session
    snapshot: SnapshotHandle | None  # None: of the base, or to be opened from `path` at the next request
    path: str | None
    is_ephemeral: bool
    # number -> request id and samples, of the first request; its result is kept by promises alone
    requests: dict[int, tuple[str, int]] = field(default_factory=dict)
    running: int = 0
    used: float = field(default_factory=time.monotonic)
    released: str | None = None  # why
    opening: asyncio.Future[None] | None = None  # of `path`


class State:
    """A server's parts, its objects by id, and its background tasks."""

    def __init__(self, backend: ServeBackend, limits: Limits, store: CheckpointStore) -> None:
        self.backend, self.limits, self.store = backend, limits, store
        self.promises: Promises = MemoryPromises(
            result_s=limits.result_s, undelivered_s=limits.undelivered_s, max_bytes=limits.result_bytes
        )
        self.sessions: dict[str, Session] = {}
        self.models: dict[str, Model] = {}
        self.samplers: dict[str, Sampler] = {}
        self.samples_in_flight: Counter[str] = Counter()  # by tenant
        self.calls_queued: Counter[str] = Counter()  # of models, that wait or run, by tenant
        self.turns = {name: SampleTurns(round(base.max_sequences * QUEUED)) for name, base in backend.bases.items()}
        self.started_at, self.began = now(), time.monotonic()
        self.parks_after = 0.0  # monotonic; later than now after the disk has refused a model
        self.database = store.database
        self.counts: Counter[str] = Counter()
        self.closing = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._bases = {name: base for base in backend.bases.values() for name in (base.name, *base.aliases)}

    def base(self, name: str) -> Base:
        """
        Raises:
            Refusal: 400, with the names that are served.
        """
        if name not in self._bases:
            raise bad_request(f"base_model: found {name[:200]!r}; wanted one of {', '.join(sorted(self._bases))}")
        return self._bases[name]

    def session(self, session_id: str, tenant: str) -> Session:
        session = self.sessions.get(session_id)
        if session is None or session.tenant != tenant or session.ended is not None:
            raise not_found("session", session_id[:100])
        session.seen = time.monotonic()
        return session

    def hear(self, session_id: str) -> None:
        """A client of the session is there."""
        session = self.sessions.get(session_id)
        if session is not None and session.ended is None:
            session.seen = time.monotonic()

    def model(self, model_id: str, tenant: str) -> Model:
        model = self.models.get(model_id)
        if model is None or model.session.tenant != tenant:
            raise not_found("model", model_id[:100])
        model.session.seen = model.used = time.monotonic()
        model.last_request = now()
        return model

    def sampler(self, sampler_id: str, tenant: str) -> Sampler:
        sampler = self.samplers.get(sampler_id)
        if sampler is None or sampler.session.tenant != tenant:
            raise not_found("sampling session", sampler_id[:100])
        sampler.session.seen = sampler.used = time.monotonic()
        return sampler

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run in the background; the task is kept alive until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def fail(self, promise: Promise, text: str, category: str = "user") -> None:
        self.promises.settle(promise, FailedResult(Failure(text, "user" if category == "user" else "server")))

    async def settle(self, promise: Promise, work: Awaitable[Result], names: dict[str, str] | None = None) -> None:
        """Settle a promise with the result of `work`, or with its error. `names`: folders -> what clients call them."""
        try:
            result = await work
        except RlsysError as error:
            failure, reference = failure_of(error, {**self.names(), **(names or {})}), promise.id[-12:]
            level = logging.INFO if failure.category == "user" else logging.ERROR
            log.log(
                level, "promise %s failed, reference %s: %s: %s", promise.id, reference, type(error).__name__, error
            )
            result = FailedResult(referenced(failure, reference))
        except asyncio.CancelledError:
            self.fail(promise, "the request was cancelled")
            raise
        except Exception:  # the edge of a background task: the client gets a reference, the log the rest
            reference = promise.id[-12:]
            log.exception("promise %s failed, reference %s", promise.id, reference)
            result = FailedResult(Failure(f"internal error of the server; reference {reference}", "server"))
        self.promises.settle(promise, result)

    async def drain(self, limit_s: float) -> None:
        """Wait for background tasks; cancel those that remain."""
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=limit_s)
            for task in pending:
                task.cancel()

    def names(self) -> dict[str, str]:
        """Folder of each base -> what clients call it."""
        return {base.about.folder: base.name for base in self.backend.bases.values()}


def now() -> datetime:
    return datetime.now(UTC)
