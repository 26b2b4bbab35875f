"""Actor class of a deployment's sampler: one vLLM engine, in a host process, shared by many sampling clients."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING

from actors.hosting.host_process import start_host
from actors.hosting.snapshot_body import SnapshotBody
from rlsys.client.backend import SampleAnswer
from rlsys.client.config import SamplerSpec
from rlsys.errors import SamplingError
from rlsys.sampler.engine_start import prepare_environment
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
        self.clients_by_snapshot: Counter[str] = Counter()
        self.refs: dict[str, ray.ObjectRef[WeightUpdate]] = {}
        self.snapshot_cache = SnapshotCache(
            spec.section.max_live_adapters, self._load, self._unload, spec.room_timeout_s
        )

    async def preload(self) -> None:
        await self.host.call("preload")

    async def start(self) -> None:
        await self.host.call("start")

    async def prove(self, probe: StartupProbe) -> None:
        await self.host.call("prove", probe)

    async def register(self, key: str, ref: list[ray.ObjectRef[WeightUpdate]]) -> None:
        """Count one more client that holds this snapshot. `ref` is wrapped in a list, so that Ray does not fetch the
        snapshot yet."""
        self.clients_by_snapshot[key] += 1
        self.refs[key] = ref[0]

    async def release(self, key: str) -> None:
        self.clients_by_snapshot[key] -= 1
        if self.clients_by_snapshot[key] <= 0:
            del self.clients_by_snapshot[key], self.refs[key]
            await self.snapshot_cache.unload_when_idle(key)

    async def sample(
        self, key: str | None, prompt: Array, n: int, params: SamplingParams, prompt_logprobs: bool, topk: int
    ) -> SampleAnswer:
        async with self._using(key):
            return await self.host.call("answer", key, prompt, n, params, prompt_logprobs, topk)

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

    async def _load(self, key: str) -> None:
        if key not in self.refs:
            raise SamplingError(f"snapshot {key} was released: no client holds it any more")
        await self.host.call("serve", key, await self.refs[key])

    async def _unload(self, key: str) -> None:
        await self.host.call("withdraw", key)
