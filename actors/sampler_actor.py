"""Actor of one vLLM engine, which runs in a host process below the actor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

import ray

from actors.cluster.processors import pin
from actors.forking.client import why_not_forked
from actors.hosting.host_process import HostProcess, start_host
from actors.hosting.sampler_body import SamplerBody, SampleRequest
from rlsys.architectures.precision import computing_dtype
from rlsys.config import JobConfig
from rlsys.sampler.engine_start import prepare_environment

if TYPE_CHECKING:
    from actors.cluster.base_folder import Base
    from rlsys.data.problems import ProblemSet
    from rlsys.rollouts import Rollouts
    from rlsys.weight_sync.canary import StartupProbe
    from rlsys.weight_sync.update import Attestation, WeightUpdate


class SamplerActor:
    """Async: passes concurrent calls on to the host process."""

    body: ClassVar[type[SamplerBody]] = SamplerBody

    def __init__(self, config: JobConfig, index: int) -> None:
        pin(config.sampler.cores, "sampler.cores")  # the host's and the engine's processes inherit it
        prepare_environment(config.sampler, config.sampler_device)
        self.config, self.index = config, index
        self.host = start_host(f"sampler {index}", config.sampler_device, self.body, config, index)

    async def process(self) -> tuple[int, str, str]:
        """Id of the host process, why it or this process was not forked although its node has a fork server, and the
        dtype in which the engine computes."""
        pid, why = os.getpid(), why_not_forked()
        if isinstance(self.host, HostProcess):
            pid, why = self.host.pid, self.host.not_forked or why
        return pid, why, computing_dtype(self.config.model.dtype, self.config.sampler_device)

    async def preload(self) -> None:
        await self.host.call("preload")

    async def start(self, base: Base) -> None:
        """Start the engine."""
        await self.host.call("start", base)

    async def join(
        self, train: ProblemSet, held_out: ProblemSet, probe: StartupProbe, bound: float | None
    ) -> Attestation:
        """Take the problems, and prove that adapters reach the engine's forward pass."""
        await self.take(train, held_out)
        return await self.host.call("prove", probe, bound)

    async def take(self, train: ProblemSet, held_out: ProblemSet) -> None:
        await self.host.call("take", train, held_out)

    async def replace(
        self,
        base: Base,
        train: ProblemSet,
        held_out: ProblemSet,
        probe: StartupProbe,
        update: WeightUpdate | None,
        bound: float | None,
    ) -> Attestation | None:
        """Start in a running job: start the engine, join, load the current version."""
        await self.start(base)
        await self.join(train, held_out, probe, bound)
        return None if update is None else await self.load(update, bound)

    @ray.method(num_returns=2)
    async def sample(self, request: SampleRequest) -> tuple[Rollouts, dict[str, float]]:
        rollouts, counts = await self.host.call("sample", request)
        return rollouts, counts

    async def load(self, update: WeightUpdate, bound: float | None, reload: bool = False) -> Attestation:
        """`reload`: unload every version of the run first. The learner was rolled back, so version numbers repeat."""
        return await self.host.call("load", update, bound, reload)

    async def sleep(self) -> None:
        await self.host.call("sleep")

    async def wake(self) -> None:
        await self.host.call("wake")

    async def progress(self) -> tuple[int, ...] | None:
        """Changes with the engine's work; None before the engine starts."""
        return await self.host.call("progress")

    async def stop(self) -> None:
        """Stop environments and engine, if they were started, and then the host process."""
        await self.host.call("stop")
        await self.host.close()
