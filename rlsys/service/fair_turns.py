"""Whose turn it is on a learner: fair shares of tokens between tenants, then between a tenant's models.

Start-time fair queueing on two levels. Each tenant with work has a virtual time, which grows by the tokens worked for
that tenant; the tenant with the smallest is served next. A tenant who had no work begins at the virtual time of the
turn served last, so that idleness earns no credit. A tenant's models share that tenant's turns by the same rule, and a
model's work is done in the order of its entry.

    turns of       big, 4 tokens    small, 1 token
    virtual time   0 - 4   4 - 8    0 - 1 - 2 - 3 - 4    big, small x 4, big, small x 4, ...
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Generic, TypeVar

Work = TypeVar("Work")


class FairShares:
    """Shares one resource between the members that compete for it."""

    def __init__(self) -> None:
        self._competing: dict[str, int] = {}  # member -> when it joined or was served last
        self._times: dict[str, float] = {}  # member -> virtual time; absent if not after `_now`
        self._now = 0.0  # virtual time of the member that was chosen last
        self._clock = itertools.count()

    def __len__(self) -> int:
        return len(self._competing)

    def join(self, member: str) -> None:
        if member not in self._competing:
            self._competing[member] = next(self._clock)
            self._times[member] = max(self._times.get(member, 0.0), self._now)

    def leave(self, member: str) -> None:
        """The member has no work. What it used beyond the others is remembered until they have used as much, or nobody
        has work."""
        self._competing.pop(member, None)
        if not self._competing:
            self._times, self._now = {}, 0.0
            return
        self._times = {name: time for name, time in self._times.items() if name in self._competing or time > self._now}

    def choose(self) -> str:
        """The member that has used least; of equal ones, the one that has waited longest."""
        chosen = min(self._competing, key=lambda member: (self._times[member], self._competing[member]))
        self._now = max(self._now, self._times[chosen])
        return chosen

    def charge(self, member: str, amount: float) -> None:
        self._times[member] = max(self._times.get(member, 0.0), self._now) + amount
        if member in self._competing:
            self._competing[member] = next(self._clock)


class FairTurns(Generic[Work]):
    """Queues of work by tenant and model."""

    def __init__(self) -> None:
        self._tenants = FairShares()
        self._models: dict[str, FairShares] = {}  # tenant -> shares of the models with work
        self._queues: dict[tuple[str, str], deque[Work]] = {}  # (tenant, model) -> work

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def enter(self, tenant: str, model_id: str, work: Work) -> None:
        self._queues.setdefault((tenant, model_id), deque()).append(work)
        self._tenants.join(tenant)
        self._models.setdefault(tenant, FairShares()).join(model_id)

    def choose(self) -> Work:
        """The work whose turn it is. It stays in its queue until `remove`."""
        tenant = self._tenants.choose()
        return self._queues[tenant, self._models[tenant].choose()][0]

    def charge(self, tenant: str, model_id: str, tokens: float) -> None:
        """Count a turn of this model."""
        self._tenants.charge(tenant, tokens)
        if tenant in self._models:
            self._models[tenant].charge(model_id, tokens)

    def remove(self, tenant: str, model_id: str, work: Work) -> None:
        """The work is done, or will not be done."""
        queue = self._queues[tenant, model_id]
        queue.remove(work)
        if queue:
            return
        del self._queues[tenant, model_id]
        self._models[tenant].leave(model_id)
        if not len(self._models[tenant]):
            del self._models[tenant]
            self._tenants.leave(tenant)

    def work_of(self, model_id: str) -> list[Work]:
        """All work of a model, in the order of entry."""
        return [work for (_, model), queue in self._queues.items() if model == model_id for work in queue]

    def all_work(self) -> list[Work]:
        return [work for queue in self._queues.values() for work in queue]
