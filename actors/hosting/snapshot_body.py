"""What the host process of a deployment's sampler runs: one engine for snapshots of many runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from rlsys.answer_parts import AnswerParts, PartsRequest
from rlsys.client.backend import SampleAnswer
from rlsys.client.config import SamplerSpec
from rlsys.errors import ActorDiedError
from rlsys.types import Array, SamplingParams

if TYPE_CHECKING:
    from rlsys.sampler.engine import Sampler
    from rlsys.service.snapshot_engine import SnapshotEngine
    from rlsys.weight_sync.canary import StartupProbe
    from rlsys.weight_sync.update import WeightUpdate


class SnapshotBody:
    """All methods may run concurrently: the engine batches the calls."""

    def __init__(self, spec: SamplerSpec, index: int) -> None:
        self.spec, self.index = spec, index
        self._sampler: Sampler | None = None

    async def preload(self) -> None:
        from rlsys.sampler import engine_start

        engine_start.preload_to_fork(self.spec.device)

    async def start(self) -> None:
        from actors.cluster.base_folder import local_folder

        await self.preload()
        from rlsys.sampler.engine import Sampler

        spec = self.spec
        assert spec.model.path is not None
        with local_folder(spec.model.path) as folder:
            self._sampler = Sampler(
                name=str(self.index),
                base=folder,
                model=spec.model,
                section=spec.section,
                seed=self.index,
                device=spec.device,
            )
            await self._sampler.start()

    async def check(self) -> None:
        """
        Raises:
            ActorDiedError: the engine is dead.
        """
        if self._sampler is not None and self._sampler.engine.is_dead:
            raise ActorDiedError(f"sampler {self.index}: its vLLM engine is dead")

    async def prove(self, probe: StartupProbe) -> None:
        await self.sampler.probe(probe, self.spec.max_canary_diff)

    async def serve(self, key: str, update: WeightUpdate) -> None:
        await self.snapshots.serve(key, update, self.spec.max_canary_diff)

    async def withdraw(self, key: str) -> None:
        await self.snapshots.withdraw(key)

    async def answer(
        self, key: str | None, prompt: Array, n: int, params: SamplingParams, prompt_logprobs: bool, topk: int
    ) -> SampleAnswer:
        return await self.snapshots.answer(key, prompt, n, params, prompt_logprobs, topk)

    def parts(self, key: str | None, request: PartsRequest) -> AsyncGenerator[AnswerParts, None]:
        return self.snapshots.parts(key, request)

    async def score(self, key: str | None, tokens: Array) -> Array:
        return await self.snapshots.score(key, tokens)

    async def stop(self) -> None:
        if self._sampler is not None:
            await self._sampler.stop()

    @property
    def sampler(self) -> Sampler:
        assert self._sampler is not None, "start comes first"
        return self._sampler

    @property
    def snapshots(self) -> SnapshotEngine:
        from rlsys.service.snapshot_engine import SnapshotEngine

        return SnapshotEngine(self.sampler)
