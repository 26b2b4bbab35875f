"""Actor of a deployment's learner, which many training clients share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import ray

from actors.forking.client import why_not_forked
from actors.service.learner_ranks import SeveralRanks
from rlsys.architectures.precision import computing_dtype
from rlsys.client.backend import About, Answer, ModelHandle, RunProgress, SnapshotHandle
from rlsys.client.config import DeploymentSpec, HostSpec
from rlsys.client.requests import Drop, Request
from rlsys.config import LoraSection
from rlsys.errors import ActorDiedError, ConfigError
from rlsys.service.call_order import CallOrder
from rlsys.service.host_requests import CreateRun, MakeProbe, OpenSnapshot, RestoreRun
from rlsys.service.host_turns import HostTurns, ThreadRank, in_thread
from rlsys.service.leases import HeldKeys, Leases
from rlsys.service.turn_loop import TurnLoop, TurnTaker
from rlsys.utils import gpu_memory

if TYPE_CHECKING:  # loaded with torch, in the actor
    from actors.forking.job_server import ServerAddress
    from rlsys.distributed.ranks import Ranks
    from rlsys.service.learner_host import TrainingHost
    from rlsys.weight_sync.canary import StartupProbe

Result = TypeVar("Result")
ANSWER_S = 1.0  # for answers to leave a process that ends
DEPLOYMENT = ""  # tenant of the deployment's own work


LOST_HOLDER = "its client is gone: it did not renew its lease, and its runs were dropped"


class ServiceLearner:
    """Async, so that calls can wait for their turns; the learner runs on one separate thread.

    `tenant` of a call: who shares the learner with others, by default the holder, which is one client's process.
    """

    def __init__(self, spec: DeploymentSpec, server: ServerAddress | None) -> None:
        """`server`: this node's, for other ranks of the learner."""
        self.deployment, self.spec, self.server = spec, spec.host, server
        self.thread = ThreadPoolExecutor(1, "learner")
        self.turns: dict[str, CallOrder] = {}
        self.tenants: dict[str, str] = {}  # model id -> tenant
        self.open_for_clients = asyncio.Event()
        self.started: tuple[About, TurnLoop] | None = None
        self.ranks: SeveralRanks | None = None
        self.bringing_up: asyncio.Task[About] | None = None
        self.is_broken = False
        self.leases, self.held = Leases(), HeldKeys()

    @property
    def loop(self) -> TurnLoop:
        assert self.started is not None, "the deployment calls start() first"
        return self.started[1]

    async def start(self) -> About:
        taker: TurnTaker
        if self.spec.learner.num_workers == 1:
            host = await in_thread(self.thread, _load, self.spec, None)
            taker = ThreadRank(self.thread, HostTurns(host))
        else:
            taker = self.ranks = SeveralRanks(self.spec, self.thread, self._broken, self.server)
            host = await taker.start(_load)
        self.started = host.about, TurnLoop(taker, self.spec.learner.token_budget)
        return host.about

    def _broken(self, error: Exception) -> None:
        """Fail all calls, and end this process after they were answered: ranks that do not hold the same runs cannot
        go on."""
        if self.started is not None and not self.is_broken:
            self.is_broken = True
            self.loop.fail(ActorDiedError(str(error)))
            asyncio.get_running_loop().call_later(ANSWER_S, os._exit, 1)

    async def started_as(self) -> tuple[str, str]:
        """Why this process was not forked although its node has a fork server, and the dtype of what it computes."""
        return why_not_forked(), computing_dtype(self.spec.model.dtype, self.spec.learner.device)

    async def bring_up(self) -> About:
        """Start in the place of a dead learner, and let clients join. Several clients may ask: it is done once."""
        if self.bringing_up is None:
            self.bringing_up = asyncio.create_task(self.start())
        about = await asyncio.shield(self.bringing_up)
        await self.announce()
        return about

    async def check(self) -> None:
        """
        Raises:
            ActorDiedError: the learner ends.
        """
        if self.is_broken:
            raise ActorDiedError("learner: it ends, because its ranks do not work together any more")

    async def announce(self) -> None:
        """Samplers are attested: let other clients join."""
        self.open_for_clients.set()

    async def about(self) -> About:
        await self.open_for_clients.wait()
        assert self.started is not None
        return self.started[0]

    async def described(self) -> tuple[About, DeploymentSpec]:
        """For clients that join."""
        return await self.about(), self.deployment

    async def probe(self) -> StartupProbe:
        return await self.loop.do(DEPLOYMENT, "", MakeProbe())

    async def create_model(
        self, model_id: str, lora: LoraSection, seed: int, holder: str, tenant: str | None = None
    ) -> ModelHandle:
        return await self._made(model_id, holder, tenant, CreateRun(lora, seed))

    async def restore_model(
        self, model_id: str, path: str, optimizer: bool, holder: str, tenant: str | None = None
    ) -> ModelHandle:
        return await self._made(model_id, holder, tenant, RestoreRun(path, optimizer))

    async def renew(self, holder: str) -> None:
        """`holder` is alive. Drop the runs of those that are not. Raises as `check`."""
        await self.check()
        self.leases.renew(holder)
        for gone in self.leases.expired():
            for model_id in self.held.release_all(gone):
                if self.turns.pop(model_id, None) is not None:
                    await self.loop.drop(self.tenants.pop(model_id), model_id, LOST_HOLDER)

    async def progress(self) -> dict[str, RunProgress]:
        return {model_id: RunProgress(turns.next, turns.pending) for model_id, turns in self.turns.items()}

    async def adopt(self, model_ids: Sequence[str], holder: str) -> dict[str, RunProgress]:
        """Have `holder` hold these runs too, so that they outlive the lease of a dead client. Returns those that are on
        this learner."""
        self.leases.renew(holder)
        runs = await self.progress()
        adopted = {model_id: runs[model_id] for model_id in model_ids if model_id in runs}
        for model_id in adopted:
            self.held.hold(model_id, holder)
        return adopted

    async def submit(self, model_id: str, seq: int, request: Request[Answer]) -> Answer:
        if model_id not in self.turns:
            raise ConfigError(f"training client {model_id}: its run is not on this learner; it was dropped")
        tenant = self.tenants[model_id]

        async def work() -> Answer:
            return _in_object_store(await self.loop.do(tenant, model_id, request))

        answer: Answer = await self.turns[model_id].run(seq, f"training client {model_id}: {request.op}", work)
        if isinstance(request, Drop):
            self.turns.pop(model_id, None)
            self.tenants.pop(model_id, None)
            self.held.forget(model_id)
        return answer

    async def stop(self) -> None:
        if self.ranks is not None:
            self.ranks.stop()
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def open(self, path: str, tenant: str = DEPLOYMENT) -> SnapshotHandle:
        return _in_object_store(await self.loop.do(tenant, "", OpenSnapshot(path)))

    async def _made(
        self, model_id: str, holder: str, tenant: str | None, request: CreateRun | RestoreRun
    ) -> ModelHandle:
        tenant = tenant or holder
        handle = await self.loop.do(tenant, model_id, request)
        self.leases.renew(holder)
        self.held.hold(model_id, holder)
        self.turns[model_id], self.tenants[model_id] = CallOrder(self.deployment.gap_timeout_s), tenant
        return handle


def _load(spec: HostSpec, ranks: Ranks | None) -> TrainingHost:
    from transformers.utils import logging

    from actors.cluster.base_folder import local_folder
    from rlsys.distributed.ranks import ALONE
    from rlsys.service.learner_host import TrainingHost

    logging.disable_progress_bar()
    assert spec.model.path is not None
    section = spec.learner
    gpu_memory.limit(section.device, section.num_gpus)
    with local_folder(spec.model.path) as folder:
        host = TrainingHost(folder, spec, ranks or ALONE)
    gpu_memory.give_back(section.device, section.num_gpus)  # an engine that starts on the same GPU needs free memory
    return host


def _in_object_store(answer: Result) -> Result:
    """Put a snapshot's weights into the object store, where its handle keeps them alive. Other answers pass through."""
    return replace(answer, ref=[ray.put(answer.ref)]) if isinstance(answer, SnapshotHandle) else answer
