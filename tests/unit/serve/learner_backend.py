"""A backend of the HTTP layer in this process, on a real learner of a tiny model. It samples greedily, and refuses the
rest: an engine is tested in tests/serve."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import numpy as np

from rlsys.client.backend import Answer, SampleAnswer, SnapshotHandle
from rlsys.client.config import HostSpec
from rlsys.client.requests import Drop, Request, TakeSnapshot
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.errors import SamplingError
from rlsys.rollouts import LENGTH
from rlsys.serve.backend import Base, SampleRequest
from rlsys.service.learner_host import TrainingHost

T = TypeVar("T")
Args = TypeVarTuple("Args")
MAX_LENGTH, VOCAB = 64, 64


class LearnerBackend:
    """`rlsys.serve.backend.ServeBackend`. `open` is cleared to hold the learner: calls wait until it is set."""

    def __init__(self, folder: Path, checkpoints: Path, serves_unembed: bool = True) -> None:
        spec = HostSpec(
            base_model="tiny",
            model=ModelSection(path=str(folder), max_length=MAX_LENGTH),
            learner=LearnerSection(token_budget=64),
            max_lora_rank=16,
            lora_alpha=32.0,
            serves_unembed=serves_unembed,
            checkpoints=str(checkpoints),
            detached=None,
        )
        self.host = TrainingHost(folder, spec)
        self.open = threading.Event()
        self.open.set()
        self.dropped: list[str] = []
        self.released: list[str] = []
        self.done: list[tuple[str, str]] = []  # model, operation
        self._thread = ThreadPoolExecutor(1)
        base = Base("tiny", ("Qwen/Qwen3-8B-Base",), None, self.host.about)
        self._bases = {"tiny": base}

    @property
    def bases(self) -> Mapping[str, Base]:
        return self._bases

    async def create_model(self, base: Base, model_id: str, lora: LoraSection, seed: int) -> None:
        await self._run(self.host.create, model_id, lora, seed)

    async def restore_model(self, base: Base, model_id: str, folder: Path, optimizer: bool) -> LoraSection:
        return (await self._run(self.host.restore, model_id, str(folder), optimizer)).lora

    def call(self, model_id: str, request: Request[Answer]) -> asyncio.Future[Answer]:
        return asyncio.ensure_future(self._run(self._do, model_id, request))

    def drop_model(self, model_id: str) -> None:
        self.dropped.append(model_id)
        self._thread.submit(self.host.do, model_id, Drop())

    async def open_snapshot(self, base: Base, folder: Path) -> SnapshotHandle:
        return await self._run(self._open, folder)

    def release(self, base: Base, snapshot: SnapshotHandle) -> None:
        self.released.append(snapshot.key)

    async def sample(self, base: Base, snapshot: SnapshotHandle | None, request: SampleRequest) -> SampleAnswer:
        if request.params.temperature != 0:
            raise SamplingError("temperature: this backend samples greedily; wanted 0")
        return await self._run(self._sample, None if snapshot is None else f"copy.{snapshot.key}", request)

    def _do(self, model_id: str, request: Request[Answer]) -> Answer:
        answer: Any = self.host.do(model_id, request)
        self.done.append((model_id, request.op))
        if isinstance(request, TakeSnapshot):
            self.host.learner.runs.copy(model_id, f"copy.{answer.key}")
        return answer

    def _open(self, folder: Path) -> SnapshotHandle:
        handle = self.host.open(str(folder))
        if f"copy.{handle.key}" not in self.host.learner.runs.ids:
            self.host.restore(f"copy.{handle.key}", str(folder), False)
        return handle

    def _sample(self, run_id: str | None, request: SampleRequest) -> SampleAnswer:
        learner, prompt = self.host.learner, request.prompt
        (tokens,) = learner.greedy([prompt], request.params.max_tokens, [], run_id)
        whole = np.concatenate([prompt, tokens]).astype(np.int32)
        logprobs = learner.logprobs(run_id, whole, np.array([0, len(whole)]))
        n, offsets = request.n, np.arange(request.n + 1) * len(tokens)
        return SampleAnswer(
            np.tile(tokens.astype(np.int32), n),
            np.tile(logprobs[len(prompt) :], n),
            offsets,
            np.full(n, LENGTH, np.int8),
            logprobs[: len(prompt)] if request.prompt_logprobs else None,
            None,
            None,
        )

    async def _run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        def waiting() -> T:
            assert self.open.wait(60), "the test did not open the learner"
            return work(*args)

        return await asyncio.get_running_loop().run_in_executor(self._thread, waiting)
