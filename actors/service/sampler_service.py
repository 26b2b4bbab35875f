"""Actor class of a deployment's sampler: one vLLM engine shared by many sampling clients."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING

from rlsys.client.backend import SampleAnswer
from rlsys.client.config import SamplerSpec
from rlsys.errors import SamplingError
from rlsys.service.snapshot_cache import SnapshotCache
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.canary import StartupProbe

if TYPE_CHECKING:
    import ray

    from rlsys.weight_sync.update import WeightUpdate


class ServiceSampler:
    """Async actor: serves many calls concurrently, so that the engine can batch them."""

    def __init__(self, spec: SamplerSpec, index: int) -> None:
        from rlsys.sampler import engine

        engine.prepare_environment(spec.section, spec.device)
        self.spec, self.index = spec, index
        self.clients_by_snapshot: Counter[str] = Counter()
        self.refs: dict[str, ray.ObjectRef[WeightUpdate]] = {}
        self.snapshot_cache = SnapshotCache(
            spec.section.max_live_adapters, self._load, self._unload, spec.room_timeout_s
        )

    async def preload(self) -> None:
        from rlsys.sampler import engine

        engine.preload(self.spec.device)

    async def start(self) -> None:
        from actors.cluster.base_folder import local_folder
        from rlsys.sampler.engine import Sampler
        from rlsys.service.snapshot_engine import SnapshotEngine

        spec = self.spec
        assert spec.model.path is not None
        with local_folder(spec.model.path) as folder:
            self.sampler = Sampler(
                name=str(self.index),
                base=folder,
                model=spec.model,
                section=spec.section,
                seed=self.index,
                device=spec.device,
            )
            self.snapshots = SnapshotEngine(self.sampler)
            await self.sampler.start()

    async def prove(self, probe: StartupProbe) -> None:
        await self.sampler.probe(probe, self.spec.max_canary_diff)

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
            return await self.snapshots.answer(key, prompt, n, params, prompt_logprobs, topk)

    async def logprobs(self, key: str | None, tokens: Array) -> Array:
        async with self._using(key):
            return await self.snapshots.score(key, tokens)

    async def resident(self) -> list[str]:
        return self.snapshot_cache.keys

    async def stop(self) -> None:
        await self.sampler.stop()

    def _using(self, key: str | None) -> AbstractAsyncContextManager[object]:
        return AsyncExitStack() if key is None else self.snapshot_cache.using(key)

    async def _load(self, key: str) -> None:
        if key not in self.refs:
            raise SamplingError(f"snapshot {key} was released: no client holds it any more")
        await self.snapshots.serve(key, await self.refs[key], self.spec.max_canary_diff)

    async def _unload(self, key: str) -> None:
        await self.snapshots.withdraw(key)
