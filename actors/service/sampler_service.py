"""Actor class of a deployment's sampler: one vLLM engine, in a host process, shared by many sampling clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from typing import TYPE_CHECKING

from ray.exceptions import RayError

from actors.forking.client import why_not_forked
from actors.hosting.host_process import HostProcess, start_host
from actors.hosting.snapshot_body import SnapshotBody
from rlsys.answer_parts import AnswerParts, PartsRequest
from rlsys.architectures.precision import computing_dtype
from rlsys.client.backend import SampleAnswer
from rlsys.client.config import SamplerSpec
from rlsys.errors import DataLostError, SamplingError
from rlsys.sampler.engine_start import prepare_environment
from rlsys.service.leases import HeldKeys, Leases
from rlsys.service.snapshot_cache import SnapshotCache
from rlsys.types import Array, SamplingParams

if TYPE_CHECKING:
    import ray

    from rlsys.weight_sync.canary import StartupProbe
    from rlsys.weight_sync.update import WeightUpdate


class ServiceSampler:
    """Async actor: serves many calls concurrently, so that the engine can batch them."""

    def __init__(self, spec: SamplerSpec, index: int) -> None:
        prepare_environment(spec.section, spec.device)
        self.host = start_host(f"sampler {index}", spec.device, SnapshotBody, spec, index)
        self.spec, self.leases, self.held = spec, Leases(), HeldKeys()
        self.refs: dict[str, ray.ObjectRef[WeightUpdate]] = {}
        self.snapshot_cache = SnapshotCache(
            spec.section.max_live_adapters, self._load, self._unload, spec.room_timeout_s
        )

        self.bringing_up: asyncio.Task[None] | None = None

    async def bring_up(self, probe: StartupProbe) -> None:
        """Start in the place of a dead sampler. Several clients may ask: it is done once."""
        if self.bringing_up is None:
            self.bringing_up = asyncio.create_task(self._bring_up(probe))
        await asyncio.shield(self.bringing_up)

    async def _bring_up(self, probe: StartupProbe) -> None:
        await self.preload()
        await self.start()
        await self.prove(probe)

    async def started_as(self) -> tuple[str, str]:
        """As the learner's, of this process or its host process."""
        host = self.host.not_forked if isinstance(self.host, HostProcess) else ""
        return host or why_not_forked(), computing_dtype(self.spec.model.dtype, self.spec.device)

    async def check(self) -> None:
        """
        Raises:
            ActorDiedError: the host process or the engine is dead.
        """
        await self.host.call("check")

    async def preload(self) -> None:
        await self.host.call("preload")

    async def start(self) -> None:
        await self.host.call("start")

    async def prove(self, probe: StartupProbe) -> None:
        await self.host.call("prove", probe)

    async def register(self, key: str, ref: list[ray.ObjectRef[WeightUpdate]], holder: str, count: int = 1) -> None:
        """Note `count` more clients of `holder` that hold this snapshot. `ref` is wrapped in a list, so that Ray does
        not fetch the snapshot yet."""
        self.leases.renew(holder)
        for _ in range(count):
            self.held.hold(key, holder)
        self.refs[key] = ref[0]

    async def release(self, key: str, holder: str) -> None:
        if self.held.release(key, holder):
            await self._forget(key)

    async def adopt(self, keys: Sequence[str], holder: str) -> dict[str, list[ray.ObjectRef[WeightUpdate]]]:
        """Have `holder` hold these snapshots too, so that they outlive the lease of a dead client. Returns those that
        are here, with their references."""
        self.leases.renew(holder)
        adopted = {key: [self.refs[key]] for key in keys if key in self.refs}
        for key in adopted:
            self.held.hold(key, holder)
        return adopted

    async def renew(self, holder: str) -> None:
        """`holder` is alive. Release what those held that are not. Raises as `check`."""
        self.leases.renew(holder)
        for gone in self.leases.expired():
            for key in self.held.release_all(gone):
                await self._forget(key)
        await self.check()

    async def sample(
        self, key: str | None, prompt: Array, n: int, params: SamplingParams, prompt_logprobs: bool, topk: int
    ) -> SampleAnswer:
        async with self._using(key):
            return await self.host.call("answer", key, prompt, n, params, prompt_logprobs, topk)

    async def parts(self, key: str | None, request: PartsRequest) -> AsyncGenerator[AnswerParts, None]:
        """As `sample`, in parts as they are sampled: call it with num_returns="streaming"."""
        async with self._using(key), aclosing(self.host.stream("parts", key, request)) as parts:
            async for part in parts:
                yield part

    async def logprobs(self, key: str | None, tokens: Array) -> Array:
        async with self._using(key):
            return await self.host.call("score", key, tokens)

    async def resident(self) -> list[str]:
        return self.snapshot_cache.keys

    async def stop(self) -> None:
        await self.host.call("stop")
        await self.host.close()

    def _using(self, key: str | None) -> AbstractAsyncContextManager[object]:
        return AsyncExitStack() if key is None else self.snapshot_cache.using(key)

    async def _forget(self, key: str) -> None:
        del self.refs[key]
        await self.snapshot_cache.unload_when_idle(key)

    async def _load(self, key: str) -> None:
        if key not in self.refs:
            raise SamplingError(f"snapshot {key} was released: no client holds it any more")
        try:
            update = await self.refs[key]
        except RayError as error:
            raise DataLostError(
                f"snapshot {key}: its weights are lost with the learner or the node that held them; take another "
                "snapshot, or open a saved one"
            ) from error
        await self.host.call("serve", key, update)

    async def _unload(self, key: str) -> None:
        await self.host.call("withdraw", key)
