"""Figures of a running server. The only module of this package that knows `State`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import psutil

from rlsys.errors import RlsysError
from rlsys.serve.backend import Base, ServeBackend
from rlsys.serve.state import State

RATE_S = 30.0  # rates are those of this time
COUNTED = ("train_tokens", "sampled_tokens", "steps", "sample_requests")


@dataclass(frozen=True, slots=True)
class BaseFigures:
    """One served base."""

    name: str
    aliases: Sequence[str]
    max_length: int
    models: int  # training runs
    samplers: int  # sampling sessions that are open
    waiting_calls: int  # of its models, for their turn


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """One tenant that has something open. Tenants are those of the keys file."""

    name: str
    sessions: int
    models: int
    samplers: int
    samples_in_flight: int


@dataclass(frozen=True, slots=True)
class Figures:
    """The server at one moment; counts are since its start."""

    started_at: str  # ISO 8601
    uptime_s: float
    stopping: bool
    sessions: int
    unsettled_promises: int
    samples_in_flight: int
    result_bytes: int
    memory_bytes: int  # resident, of the controller
    train_tokens: int
    sampled_tokens: int
    steps: int
    sample_requests: int
    bases: Sequence[BaseFigures]
    tenants: Sequence[TenantFigures]


def figures(state: State) -> Figures:
    """Call on the controller's event loop."""
    sessions = [each for each in state.sessions.values() if each.ended is None]
    samplers = [each for each in state.samplers.values() if each.released is None]
    models = list(state.models.values())
    bases = [
        BaseFigures(
            name=base.name,
            aliases=base.aliases,
            max_length=base.about.max_length,
            models=sum(each.base.name == base.name for each in models),
            samplers=sum(each.base.name == base.name for each in samplers),
            waiting_calls=sum(each.queue.waiting for each in models if each.base.name == base.name),
        )
        for base in state.backend.bases.values()
    ]
    names = {each.tenant for each in sessions} | {name for name, count in state.samples_in_flight.items() if count}
    tenants = [
        TenantFigures(
            name=name,
            sessions=sum(each.tenant == name for each in sessions),
            models=sum(each.session.tenant == name for each in models),
            samplers=sum(each.session.tenant == name for each in samplers),
            samples_in_flight=state.samples_in_flight[name],
        )
        for name in sorted(names)
    ]
    return Figures(
        started_at=state.started_at.isoformat(timespec="seconds"),
        uptime_s=round(time.monotonic() - state.began, 1),
        stopping=state.closing,
        sessions=len(sessions),
        unsettled_promises=state.promises.unsettled,
        samples_in_flight=state.samples_in_flight.total(),
        result_bytes=state.promises.nbytes,
        memory_bytes=psutil.Process().memory_info().rss,
        train_tokens=state.counts["train_tokens"],
        sampled_tokens=state.counts["sampled_tokens"],
        steps=state.counts["steps"],
        sample_requests=state.counts["sample_requests"],
        bases=bases,
        tenants=tenants,
    )


async def deployment_states(backend: ServeBackend) -> dict[str, str]:
    """By name of the base: "ready", or why it is not."""

    async def state(base: Base) -> str:
        try:
            await backend.check(base)
        except RlsysError as error:
            return str(error)
        return "ready"

    bases = list(backend.bases.values())
    return dict(zip((base.name for base in bases), await asyncio.gather(*map(state, bases)), strict=True))


class Rates:
    """Counts per second over the last `window_s`, or since the last note if that is longer ago."""

    def __init__(self, window_s: float = RATE_S) -> None:
        self._window_s = window_s
        self._seen = deque[tuple[float, Figures]]()

    def note(self, found: Figures) -> None:
        at = time.monotonic()
        self._seen.append((at, found))
        while len(self._seen) > 1 and at - self._seen[1][0] >= self._window_s:
            self._seen.popleft()

    def per_s(self, found: Figures) -> dict[str, float]:
        """Rates up to `found`; 0 before there are two moments to compare."""
        if not self._seen:
            return {f"{name}_per_s": 0.0 for name in COUNTED}
        at, before = self._seen[0]
        seconds = max(time.monotonic() - at, 1e-3)
        return {f"{name}_per_s": round((getattr(found, name) - getattr(before, name)) / seconds, 2) for name in COUNTED}


class StatusLine:
    """One line about the time since the last one."""

    def __init__(self, began: Figures) -> None:
        self._rates = Rates(0.0)
        self._rates.note(began)
        self._shown = ""

    def text(self, found: Figures) -> str | None:
        """None while nothing happens."""
        rates = self._rates.per_s(found)
        self._rates.note(found)
        body = (
            f"sessions {found.sessions}  models {sum(each.models for each in found.bases)}  "
            f"waiting calls {sum(each.waiting_calls for each in found.bases)}  "
            f"samples in flight {found.samples_in_flight}  trained {rates['train_tokens_per_s']:,.0f} tokens/s  "
            f"sampled {rates['sampled_tokens_per_s']:,.0f} tokens/s  steps {rates['steps_per_s']:.2f}/s  "
            f"sample requests {rates['sample_requests_per_s']:.1f}/s  results {found.result_bytes / 2**20:.1f} MiB"
        )
        if body == self._shown:
            return None
        self._shown = body
        return f"{datetime.now():%H:%M:%S}  {body}"


def as_json(found: Figures, rates: Rates) -> dict[str, Any]:  # Any: JSON
    """`found` with its rates, and the memory of this process."""
    return {**asdict(found), **rates.per_s(found), "http_memory_bytes": psutil.Process().memory_info().rss}
