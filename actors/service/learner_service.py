"""Door onto a learner that many training clients share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray

from rlsys.client.backend import About, ModelHandle, SnapshotHandle
from rlsys.client.config import HostSpec
from rlsys.client.requests import Drop, Request
from rlsys.config import LoraSection
from rlsys.errors import ConfigError
from rlsys.service.call_order import CallOrder
from rlsys.utils import gpu_memory


class ServiceLearner:
    """Async, so that calls can wait for their turn; the learner itself runs on one thread of its own."""

    def __init__(self, spec: HostSpec, gap_timeout_s: float) -> None:
        self.spec, self.gap_timeout_s = spec, gap_timeout_s
        self.thread = ThreadPoolExecutor(1, "learner")
        self.turns: dict[str, CallOrder] = {}
        self.open_for_clients = asyncio.Event()

    async def start(self) -> About:
        self.host = await self._run(_load, self.spec)
        about: About = self.host.about
        return about

    async def announce(self) -> None:
        """Samplers have proved themselves; from now on others may join."""
        self.open_for_clients.set()

    async def about(self) -> About:
        await self.open_for_clients.wait()
        about: About = self.host.about
        return about

    async def probe(self) -> Any:
        return await self._run(self.host.probe)

    async def create_model(self, model_id: str, lora: LoraSection, seed: int) -> ModelHandle:
        return await self._made(model_id, self.host.create, lora, seed)

    async def restore_model(self, model_id: str, path: str, optimizer: bool) -> ModelHandle:
        return await self._made(model_id, self.host.restore, path, optimizer)

    async def submit(self, model_id: str, seq: int, request: Request[Any]) -> Any:
        if model_id not in self.turns:
            raise ConfigError(f"training client {model_id}: its run is not on this learner; it was dropped")
        async with self.turns[model_id].turn(seq, f"training client {model_id}: {request.op}"):
            answer = await self._run(self.host.do, model_id, request)
        if isinstance(request, Drop):
            del self.turns[model_id]
        return _published(answer)

    async def stop(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def open(self, path: str) -> SnapshotHandle:
        opened: SnapshotHandle = _published(await self._run(self.host.open, path))
        return opened

    async def _made(self, model_id: str, make: Callable[..., Any], *args: Any) -> ModelHandle:
        handle: ModelHandle = await self._run(make, model_id, *args)
        self.turns[model_id] = CallOrder(self.gap_timeout_s)
        return handle

    async def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *args)


def _load(spec: HostSpec) -> Any:
    from transformers.utils import logging

    from actors.cluster.base_folder import local_folder
    from rlsys.service.learner_host import TrainingHost

    logging.disable_progress_bar()
    assert spec.model.path is not None
    section = spec.learner
    gpu_memory.limit(section.device, section.num_gpus)
    with local_folder(spec.model.path) as folder:
        host = TrainingHost(folder, spec)
    gpu_memory.give_back(section.device, section.num_gpus)  # an engine that starts on the same GPU wants its part free
    return host


def _published(answer: Any) -> Any:
    """A snapshot's weights go to the object store; who holds the handle keeps them there."""
    return replace(answer, ref=[ray.put(answer.ref)]) if isinstance(answer, SnapshotHandle) else answer
