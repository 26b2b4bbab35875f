"""The backend of `rlsys serve` on Ray deployments: one deployment per served base."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from actors.service.deployment import RayBackend, RayDeployment
from rlsys.answer_parts import AnswerParts, PartsRequest
from rlsys.client.backend import Adopted, Answer, SampleAnswer, SnapshotHandle
from rlsys.client.requests import Request
from rlsys.config import LoraSection, SamplerSection
from rlsys.errors import ConfigError, StalledError
from rlsys.serve.backend import Base, SampleRequest
from rlsys.serve.config import ServeConfig
from rlsys.utils.shell_paths import as_written

CHECK_S = 5.0  # how long an actor may take to say that it is there
T = TypeVar("T")


class DeploymentBackend:
    """`rlsys.serve.backend.ServeBackend`. The constructor joins or starts the deployments: minutes."""

    def __init__(self, cluster: RayBackend, config: ServeConfig) -> None:
        self._deployments: dict[str, RayDeployment] = {}
        self._models: dict[str, RayDeployment] = {}
        self._bases: dict[str, Base] = {}
        for name, model in config.models.items():
            deployment = cluster.deployment(as_written(model.path))
            self._deployments[name] = deployment
            sampler = config.deployment.sampler or SamplerSection()
            sequences = sampler.max_num_seqs * deployment.num_samplers
            self._bases[name] = Base(name, tuple(model.aliases), model.tokenizer, deployment.about, sequences)

    @property
    def bases(self) -> Mapping[str, Base]:
        return self._bases

    async def create_model(self, base: Base, model_id: str, tenant: str, lora: LoraSection, seed: int) -> None:
        deployment = self._deployments[base.name]
        await _result(deployment.create_model(lora, seed, model_id, tenant))
        self._models[model_id] = deployment

    async def restore_model(self, base: Base, model_id: str, tenant: str, folder: Path, optimizer: bool) -> LoraSection:
        deployment = self._deployments[base.name]
        handle = await _result(deployment.restore_model(str(folder), optimizer, model_id, tenant))
        self._models[model_id] = deployment
        return handle.lora

    def call(self, model_id: str, number: int, request: Request[Answer]) -> asyncio.Future[Answer]:
        if model_id not in self._models:
            raise ConfigError(f"model {model_id}: is not on the learner")
        return asyncio.wrap_future(self._models[model_id].submit(model_id, number, request))

    def drop_model(self, model_id: str, number: int) -> None:
        deployment = self._models.pop(model_id, None)
        if deployment is not None:
            deployment.drop_model(model_id, number)
            deployment.let_go()

    async def adopt(self, base: Base, model_ids: Sequence[str], snapshot_keys: Sequence[str]) -> Adopted:
        deployment = self._deployments[base.name]
        adopted = await _result(deployment.adopt(model_ids, snapshot_keys))
        self._models.update(dict.fromkeys(adopted.runs, deployment))
        return adopted

    async def open_snapshot(self, base: Base, folder: Path) -> SnapshotHandle:
        return await _result(self._deployments[base.name].open(str(folder)))

    def release(self, base: Base, snapshot: SnapshotHandle) -> None:
        deployment = self._deployments[base.name]
        deployment.release(snapshot)
        deployment.let_go()

    async def check(self, base: Base) -> None:
        answers = [asyncio.wrap_future(each) for each in self._deployments[base.name].check()]
        try:
            async with asyncio.timeout(CHECK_S):
                await asyncio.gather(*answers)
        except TimeoutError:
            raise StalledError(f"{base.name}: its learner or a sampler did not answer within {CHECK_S:g} s") from None

    async def sample(self, base: Base, snapshot: SnapshotHandle | None, request: SampleRequest) -> SampleAnswer:
        return await _result(
            self._deployments[base.name].sample(
                snapshot, request.prompt, request.n, request.params, request.prompt_logprobs, request.topk
            )
        )

    def parts(
        self, base: Base, snapshot: SnapshotHandle | None, request: PartsRequest
    ) -> AsyncGenerator[AnswerParts, None]:
        return self._deployments[base.name].parts(snapshot, request)


async def _result(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)
