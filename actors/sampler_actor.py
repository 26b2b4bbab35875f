"""Door onto one vLLM engine."""

from __future__ import annotations

from typing import Any

import ray

from rlsys.config import JobConfig
from rlsys.types import Array, SamplingParams
from rlsys.weights import Attestation, WeightUpdate


class SamplerActor:
    """Async: many calls at once, which is how the engine batches them."""

    def __init__(self, config: JobConfig, index: int) -> None:
        from rlsys import sampler

        sampler.prepare_environment(config.sampler, config.sampler_device)
        self.config, self.index = config, index

    async def preload(self) -> None:
        from rlsys import sampler

        sampler.preload(self.config.sampler_device)

    async def start(self, base: Any, train: Any, held_out: Any) -> None:
        from actors.base_folder import local_folder
        from rlsys.sampler import Sampler

        config = self.config
        self.problems = {"train": train, "eval": held_out}
        with local_folder(base) as folder:
            self.sampler = Sampler(
                name=str(self.index),
                base=folder,
                model=config.model,
                section=config.sampler,
                seed=config.run.seed * 1000 + self.index,
                device=config.sampler_device,
            )
            await self.sampler.start()

    async def replace(
        self, base: Any, train: Any, held_out: Any, probe: WeightUpdate, update: WeightUpdate | None, bound: float
    ) -> Attestation | None:
        """Start in a job that is under way: everything that the samplers of its beginning had to prove, in one call."""
        await self.start(base, train, held_out)
        await self.prove(probe, bound)
        return None if update is None else await self.load(update, bound)

    @ray.method(num_returns=2)
    async def sample(self, split: str, problems: Array, n: int, params: SamplingParams, version: int) -> Any:
        tokens, offsets = self.problems[split].select(problems)
        rollouts = await self.sampler.sample(problems, tokens, offsets, n, params, self.config.run.name, version)
        return rollouts, rollouts.counts()

    async def load(self, update: WeightUpdate, bound: float, anew: bool = False) -> Attestation:
        """`anew`: forget every version of the run first; the learner went back, and numbers come a second time."""
        if anew:
            await self.sampler.rewind(self.config.run.name)
        return await self.sampler.load(update, bound)

    async def prove(self, probe: WeightUpdate, bound: float) -> Attestation:
        return await self.sampler.probe(probe, bound)

    async def sleep(self) -> None:
        await self.sampler.sleep()

    async def wake(self) -> None:
        await self.sampler.wake()

    async def progress(self) -> Any:
        """Changes whenever the engine moves; nothing yet before it has started."""
        return await self.sampler.progress() if hasattr(self, "sampler") else None

    async def stop(self) -> None:
        """Also where `start` was never reached."""
        if hasattr(self, "sampler"):
            await self.sampler.stop()
