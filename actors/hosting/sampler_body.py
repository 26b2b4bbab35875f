"""What a sampler actor's host process runs: the engine of a job and the conversations of its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsys.config import JobConfig
from rlsys.types import Array, SamplingParams

if TYPE_CHECKING:
    from actors.cluster.base_folder import Base
    from rlsys.data.problems import ProblemSet
    from rlsys.environments.multi_turn import Conversations
    from rlsys.rollouts import Rollouts
    from rlsys.sampler.engine import Sampler
    from rlsys.weight_sync.canary import StartupProbe
    from rlsys.weight_sync.update import Attestation, WeightUpdate


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Groups of one call."""

    split: str
    problems: Array  # (P,)
    occurrence: Array  # (P,) of each problem among all that are sampled under the seed
    n: int  # completions of each
    params: SamplingParams
    version: int


@dataclass(frozen=True, slots=True)
class Started:
    sampler: Sampler
    conversations: Conversations | None  # of a task with several turns


class SamplerBody:
    """All methods may run concurrently: the engine batches the calls."""

    def __init__(self, config: JobConfig, index: int) -> None:
        self.config, self.index = config, index
        self.started: Started | None = None
        self.problems: Mapping[str, ProblemSet] = {}  # by split, from `take` on

    async def preload(self) -> None:
        from rlsys.sampler import engine_start

        engine_start.preload_to_fork(self.config.sampler_device)

    async def start(self, base: Base) -> None:
        from actors.cluster.base_folder import local_folder
        from actors.machine.gpus import refuse_dtype

        await self.preload()
        from rlsys.environments.multi_turn import Conversations
        from rlsys.sampler.engine import Sampler

        config = self.config
        if config.sampler_device == "cuda":
            refuse_dtype(config.model.dtype, f"sampler {self.index}")
        with local_folder(base) as folder:
            sampler = Sampler(
                name=str(self.index),
                base=folder,
                model=config.model,
                section=config.sampler,
                seed=config.run.seed * 1000 + self.index,
                device=config.sampler_device,
            )
            conversations = Conversations.start(config, folder, sampler)
            # Before the engine starts: its progress is watched, and it can be stopped, while it starts.
            self.started = Started(sampler, conversations)
            await sampler.start()
        if conversations is not None:
            conversations.begin()  # its pool has threads, which the engine is not forked among

    async def take(self, train: ProblemSet, held_out: ProblemSet) -> None:
        self.problems = {"train": train, "eval": held_out}

    async def prove(self, probe: StartupProbe, bound: float | None) -> Attestation:
        return await self.sampler.probe(probe, bound)

    async def sample(self, request: SampleRequest) -> tuple[Rollouts, dict[str, float]]:
        started, run = self._running, self.config.run.name
        known, problems = self.problems[request.split], request.problems
        # an evaluation is of one version
        moves = self.config.overlap.continue_on_new_weights and request.split == "train"
        tokens, offsets = known.select(problems)
        how = request.n, request.params, run, request.version, moves, request.occurrence
        if started.conversations is None:
            rollouts = await started.sampler.sample(problems, tokens, offsets, *how)
            return rollouts, rollouts.counts()
        answers = [known.answers[i] for i in problems]
        rollouts, counts = await started.conversations.sample(problems, tokens, offsets, answers, *how)
        return rollouts, {**rollouts.counts(), **counts}

    async def load(self, update: WeightUpdate, bound: float | None, reload: bool) -> Attestation:
        if reload:
            await self.sampler.roll_back(self.config.run.name)
        return await self.sampler.load(update, bound)

    async def sleep(self) -> None:
        await self.sampler.sleep()

    async def wake(self) -> None:
        await self.sampler.wake()

    async def progress(self) -> tuple[int, ...] | None:
        if self.started is None:
            return None
        conversations = self.started.conversations
        return *await self.started.sampler.progress(), 0 if conversations is None else conversations.progress()

    async def stop(self) -> None:
        if self.started is None:
            return
        if self.started.conversations is not None:
            self.started.conversations.close()
        await self.started.sampler.stop()

    @property
    def _running(self) -> Started:
        assert self.started is not None, "start comes first"
        return self.started

    @property
    def sampler(self) -> Sampler:
        return self._running.sampler
