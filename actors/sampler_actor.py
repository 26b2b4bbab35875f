"""Door onto one vLLM engine."""

from __future__ import annotations

from typing import Any

import ray

from actors.cluster.processors import pin
from rlsys.config import JobConfig
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.canary import StartupProbe
from rlsys.weight_sync.update import Attestation, WeightUpdate


class SamplerActor:
    """Async: many calls at once, which is how the engine batches them."""

    def __init__(self, config: JobConfig, index: int) -> None:
        from rlsys.sampler import engine

        pin(config.sampler.cores, "sampler.cores")  # the engine's processes inherit it
        engine.prepare_environment(config.sampler, config.sampler_device)
        self.config, self.index = config, index

    async def preload(self) -> None:
        from rlsys.sampler import engine

        engine.preload(self.config.sampler_device)

    async def start(self, base: Any, train: Any, held_out: Any) -> None:
        from actors.cluster.base_folder import local_folder
        from actors.machine.gpus import refuse_dtype
        from rlsys.environments.multi_turn import Conversations
        from rlsys.sampler.engine import Sampler

        config = self.config
        if config.sampler_device == "cuda":
            refuse_dtype(config.model.dtype, f"sampler {self.index}")
        self.problems = {"train": train, "eval": held_out}
        self.moves = config.overlap.continue_on_new_weights
        with local_folder(base) as folder:
            self.sampler = Sampler(
                name=str(self.index),
                base=folder,
                model=config.model,
                section=config.sampler,
                seed=config.run.seed * 1000 + self.index,
                device=config.sampler_device,
            )
            self.conversations = Conversations.start(config, folder, self.sampler)
            await self.sampler.start()

    async def replace(
        self,
        base: Any,
        train: Any,
        held_out: Any,
        probe: StartupProbe,
        update: WeightUpdate | None,
        bound: float | None,
    ) -> Attestation | None:
        """Start in a job that is under way: everything that the samplers of its beginning had to prove, in one call."""
        await self.start(base, train, held_out)
        await self.prove(probe, bound)
        return None if update is None else await self.load(update, bound)

    @ray.method(num_returns=2)
    async def sample(
        self, split: str, problems: Array, occurrence: Array, n: int, params: SamplingParams, version: int
    ) -> Any:
        known, run = self.problems[split], self.config.run.name
        moves = self.moves and split == "train"  # an evaluation is of one version
        tokens, offsets = known.select(problems)
        if self.conversations is None:
            rollouts = await self.sampler.sample(problems, tokens, offsets, n, params, run, version, moves, occurrence)
            return rollouts, rollouts.counts()
        answers = [known.answers[i] for i in problems]
        rollouts, counts = await self.conversations.sample(
            problems, tokens, offsets, answers, n, params, run, version, moves, occurrence
        )
        return rollouts, {**rollouts.counts(), **counts}

    async def load(self, update: WeightUpdate, bound: float | None, anew: bool = False) -> Attestation:
        """`anew`: forget every version of the run first; the learner went back, and numbers come a second time."""
        if anew:
            await self.sampler.roll_back(self.config.run.name)
        return await self.sampler.load(update, bound)

    async def prove(self, probe: StartupProbe, bound: float | None) -> Attestation:
        return await self.sampler.probe(probe, bound)

    async def sleep(self) -> None:
        await self.sampler.sleep()

    async def wake(self) -> None:
        await self.sampler.wake()

    async def progress(self) -> Any:
        """Changes whenever the engine moves; nothing yet before it has started."""
        if not hasattr(self, "conversations"):  # the last thing before the engine starts
            return None
        replies = 0 if self.conversations is None else self.conversations.progress()
        return *await self.sampler.progress(), replies

    async def stop(self) -> None:
        """Also where `start` was never reached."""
        if hasattr(self, "conversations"):
            if self.conversations is not None:
                self.conversations.close()
            await self.sampler.stop()
