"""A backend of the HTTP layer in this process, on a real learner of a tiny model. It samples greedily, and refuses the
rest: an engine is tested in tests/serve."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar, TypeVarTuple

import numpy as np

from rlsys.answer_parts import AnswerParts, CompletionPart, PartsRequest, PromptScores
from rlsys.client.backend import Adopted, Answer, RunProgress, SampleAnswer, SnapshotHandle
from rlsys.client.config import HostSpec
from rlsys.client.requests import Drop, Request, TakeSnapshot
from rlsys.client.tokenizing import has_tokenizer, tokenizer_of
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.errors import ActorDiedError, DataLostError, SamplingError, StalledError
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
        self._dropped_last: set[str] = set()  # models that were not restored since
        self.released: list[str] = []
        self.done: list[tuple[str, str]] = []  # model, operation
        self.calls: dict[str, list[asyncio.Future[Any]]] = {}  # by model; like a learner it executes each once
        self.running = 0  # generators of `parts`
        self.pause_s = 0.0  # between the messages of one
        self.fails_at: int | None = None  # message of each
        self.lost = 0  # generators that find their snapshot lost
        self._thread = ThreadPoolExecutor(1)
        base = Base("tiny", ("Qwen/Qwen3-8B-Base",), None, self.host.about)
        self._bases = {"tiny": base}

    @property
    def bases(self) -> Mapping[str, Base]:
        return self._bases

    async def create_model(self, base: Base, model_id: str, tenant: str, lora: LoraSection, seed: int) -> None:
        await self._run(self.host.create, model_id, lora, seed)

    async def restore_model(self, base: Base, model_id: str, tenant: str, folder: Path, optimizer: bool) -> LoraSection:
        restored = await self._run(self.host.restore, model_id, str(folder), optimizer)
        self._dropped_last.discard(model_id)
        return restored.lora

    def call(self, model_id: str, number: int, request: Request[Answer]) -> asyncio.Future[Answer]:
        calls = self.calls.setdefault(model_id, [])
        assert number <= len(calls) + 1, f"call {number} after {len(calls)}"
        if number > len(calls):
            calls.append(asyncio.get_running_loop().run_in_executor(self._thread, self._waiting, model_id, request))
        return asyncio.ensure_future(self._answer(calls[number - 1]))

    def drop_model(self, model_id: str, number: int) -> None:
        assert number == len(self.calls.pop(model_id, [])) + 1
        self.dropped.append(model_id)
        self._dropped_last.add(model_id)
        self._thread.submit(self.host.do, model_id, Drop())

    async def adopt(self, base: Base, model_ids: Sequence[str], snapshot_keys: Sequence[str]) -> Adopted:
        ids = set(self.host.learner.runs.ids) - self._dropped_last  # the thread may not have come to a drop yet
        runs = {each: RunProgress(len(self.calls.get(each, [])) + 1) for each in model_ids if each in ids}
        return Adopted(runs, tuple(key for key in snapshot_keys if f"copy.{key}" in ids))

    async def open_snapshot(self, base: Base, folder: Path) -> SnapshotHandle:
        return await self._run(self._open, folder)

    def release(self, base: Base, snapshot: SnapshotHandle) -> None:
        self.released.append(snapshot.key)

    async def check(self, base: Base) -> None:
        try:
            async with asyncio.timeout(0.5):
                await self._run(lambda: None)
        except TimeoutError:
            raise StalledError(f"{base.name}: its learner did not answer") from None

    async def sample(self, base: Base, snapshot: SnapshotHandle | None, request: SampleRequest) -> SampleAnswer:
        if request.params.temperature != 0:
            raise SamplingError("temperature: this backend samples greedily; wanted 0")
        return await self._run(self._sample, None if snapshot is None else f"copy.{snapshot.key}", request)

    async def parts(
        self, base: Base, snapshot: SnapshotHandle | None, request: PartsRequest
    ) -> AsyncGenerator[AnswerParts, None]:
        """One message per position of the completions."""
        if request.topk or request.prompt_topk or request.also_stop or request.also_stop_ids:
            raise SamplingError("parts: this backend gives no alternatives, and stops at no condition")
        whole = SampleRequest(request.prompt, max(request.n, 1), request.params, request.prompt_topk is not None, 0)
        self.running += 1
        try:
            if self.lost:
                self.lost -= 1
                raise DataLostError("sampler 0: its weights were lost")
            answer = await self.sample(base, snapshot, whole)
            scores = answer.prompt_logprobs
            width = request.params.max_tokens
            none = np.zeros((len(request.prompt) - 1, 0), np.int32)
            prompt = None if scores is None else PromptScores(scores, none, none.astype(np.float32))
            for at in range(width) if request.n else [0]:
                if at == self.fails_at:
                    raise ActorDiedError(f"sampler 0: died in {self.host.about.folder}")
                yield AnswerParts(self._part(base, request, answer, at), prompt)
                prompt = None
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
        finally:
            self.running -= 1

    def forget(self) -> None:
        """Drop every run, once what was asked for is done: runs of earlier tests would slow down the later ones."""

        def drop_all() -> None:
            for run in self.host.learner.runs.ids:
                self.host.learner.runs.drop(run)

        self._thread.submit(drop_all).result()

    def _part(self, base: Base, request: PartsRequest, answer: SampleAnswer, at: int) -> tuple[CompletionPart, ...]:
        found = []
        for index in range(request.n):
            where = slice(answer.offsets[index] + at, answer.offsets[index] + at + 1)
            tokens, none = answer.tokens[where], np.zeros((1, 0), np.int32)
            text = (
                f"<{tokens[0]}>" if not has_tokenizer(base.about) else tokenizer_of(base.about).decode(tokens.tolist())
            )
            finish: Literal["length"] | None = "length" if at + 1 == request.params.max_tokens else None
            found.append(
                CompletionPart(index, text, tokens, answer.logprobs[where], none, none.astype(np.float32), finish)
            )
        return tuple(found)

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

    def _waiting(self, model_id: str, request: Request[Answer]) -> Answer:
        assert self.open.wait(60), "the test did not open the learner"
        return self._do(model_id, request)

    async def _answer(self, call: asyncio.Future[Answer]) -> Answer:
        return await asyncio.shield(call)

    async def _run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        def waiting() -> T:
            assert self.open.wait(60), "the test did not open the learner"
            return work(*args)

        return await asyncio.get_running_loop().run_in_executor(self._thread, waiting)
