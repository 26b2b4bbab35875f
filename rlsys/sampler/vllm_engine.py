"""A vLLM engine and its processes: start, requests, calls of its workers, sleep, end, and the cause of its death.

vLLM is imported when an engine starts, not with this module, because `prepare_environment` must run first.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlsys.config import ModelSection, SamplerSection
from rlsys.errors import ActorDiedError, ActorFailedError, SamplingError
from rlsys.sampler.engine_args import engine_arguments
from rlsys.sampler.engine_start import Device, engine_processes, preload, prepare_environment
from rlsys.sampler.heartbeat import EngineHeartbeat
from rlsys.sampler.postmortem import EngineLog, refusal
from rlsys.sampler.vllm.model_classes import register_classes
from rlsys.sampler.vllm.worker_calls import values
from rlsys.utils.text_files import plain_path

if TYPE_CHECKING:
    import vllm
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

DEATH_POLL_S = 1.0

T = TypeVar("T")


class VllmEngine:
    """Calls of one engine. `start` comes first; `heartbeat` can be read at any time."""

    def __init__(
        self,
        *,
        name: str,
        base: Path,
        model: ModelSection,
        section: SamplerSection,
        seed: int,
        device: Device,
        has_tokenizer: bool,
    ) -> None:
        self.name, self.model, self.section, self.device = name, model, section, device
        self.where = f"sampler {name}"  # in errors
        self.heartbeat = EngineHeartbeat()
        self._base, self._seed, self._has_tokenizer = base, seed, has_tokenizer
        self._calls = itertools.count()
        self._asleep = False
        self._llm: AsyncLLM | None = None
        self._log: EngineLog
        # Until the end: the engine's process reads its configuration once more when it has told that it is ready.
        self._folder = ExitStack()

    @property
    def llm(self) -> AsyncLLM:
        assert self._llm is not None, "start comes first"
        return self._llm

    @property
    def is_dead(self) -> bool:
        """Whether a process of the engine, which was started, has ended."""
        return self._llm is not None and bool(self._llm.errored)

    def arguments(self) -> dict[str, object]:
        """vLLM's engine arguments; `vllm.LLM` takes the same."""
        return engine_arguments(self._base, self.model, self.section, self._seed, self.device, self._has_tokenizer)

    def start(self) -> None:
        """Start the engine's processes and load the base.

        Raises:
            ActorFailedError: vLLM refused the base or its arguments, or the engine did not start.
        """
        prepare_environment(self.section, self.device)
        preload(self.device)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if self.device == "cpu":
            register_classes(self._base)
        self._log = EngineLog()
        folder = self._folder.enter_context(plain_path(self._base))  # vLLM globs for the weights
        try:
            with engine_processes(self.device):
                arguments = {**self.arguments(), "model": str(folder)}
                self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except RuntimeError as error:  # of the engine's process, which vLLM does not hand over
            raise ActorFailedError(
                f"{self.where}: the vLLM engine did not start on {self._base}: {self._log.cause()}"
            ) from error
        except ValueError as error:  # vLLM refused it before it made a process
            raise ActorFailedError(f"{self.where}: vLLM refused {self._base}: {refusal(error)}") from error
        self.heartbeat.watch(self.llm)

    async def started(self) -> None:
        """Ask the engine, which is up, for what `stop` has to delete."""
        for path in await self.call_workers("rlsys_meeting_file"):
            if path:
                self._folder.callback(Path(str(path)).unlink, missing_ok=True)

    def generate(
        self, prompt: list[int], params: vllm.SamplingParams, request_id: str, lora: LoRARequest | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request, which is aborted when the iteration is cancelled."""
        # "type" marks the prompt as rendered, which spares it vLLM's preprocessing threads
        inputs = {"type": "token", "prompt_token_ids": prompt}
        return self.llm.generate(inputs, params, request_id, lora_request=lora)

    async def abort(self, request_ids: list[str]) -> None:
        """Abort requests; their tokens so far come back as their outputs."""
        await self.guarded(self.llm.abort(request_ids))

    def decode(self, tokens: list[int]) -> str:
        text: str = self.llm.get_tokenizer().decode(tokens, skip_special_tokens=True)
        return text

    async def call_workers(self, method: str, *args: object) -> list[object]:
        """Answers of the tensor-parallel workers to `method` of rlsys.sampler.vllm.adapter_worker, by rank."""
        number = next(self._calls)
        asked = self.llm.collective_rpc("rlsys_answer", args=(number, method, args))
        answers = await self.guarded(asked)
        self.heartbeat.answered += 1
        return values(self.where, method, number, answers, self.section.tensor_parallel_size)

    async def guarded(self, work: Awaitable[T]) -> T:
        """The result of work on this engine, which is cancelled if the engine dies.

        vLLM fails the requests that it knows when an engine dies. It never answers a request that it takes in at that
        moment, nor a call of the engine's workers.

        Raises:
            ActorDiedError: the engine died or failed meanwhile; the message has the cause.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        answer = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([answer], timeout=DEATH_POLL_S))[0]:
                if self.is_dead:
                    raise EngineDeadError
            return answer.result()
        except (EngineDeadError, EngineGenerateError) as error:
            cause = self._log.cause() if isinstance(error, EngineDeadError) else error.__cause__ or error
            raise ActorDiedError(f"{self.where}: the vLLM engine failed: {cause}") from error
        finally:
            if not answer.done():
                answer.cancel()
                await asyncio.wait([answer], timeout=DEATH_POLL_S)

    async def sleep(self) -> None:
        """Free the GPU's memory until `wake`. Does nothing on a CPU, or if the engine sleeps."""
        if self.device == "cpu" or self._asleep:
            return
        self._asleep = True
        await self.guarded(self.llm.sleep(level=1, mode="abort"))
        self.heartbeat.answered += 1

    async def wake(self) -> None:
        """Take the memory back. Does nothing if the engine is awake."""
        if self._asleep:
            await self.guarded(self.llm.wake_up())
            self.heartbeat.answered += 1
            self._asleep = False

    def refuse_asleep(self) -> None:
        if self._asleep:
            raise SamplingError(f"{self.where}: is asleep; wanted wake() first")

    def stop(self) -> None:
        """End the engine and its processes. Call on the thread of the engine's event loop: it cancels a task of it.

        An engine of one process on a CPU is killed: it has nothing to save, and would collect its garbage for a second.
        The processes of others share memory and devices, which they give back.
        """
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown(timeout=0 if self.device == "cpu" and self.section.tensor_parallel_size == 1 else None)
        self._folder.close()
