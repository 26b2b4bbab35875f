"""The vLLM engine behind one object: sample, score, and serve versions of adapters that it has proved to hold.

vLLM is imported when an engine starts, not with this module, because `prepare_environment` has to come first.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.config import ModelSection, SamplerSection
from rlsys.engine.attest import attest, distance
from rlsys.engine.postmortem import EngineLog
from rlsys.engine.pulse import EnginePulse
from rlsys.engine.requests import BaseModel, check_sequences, columns, engine_params, group_seeds, score_params
from rlsys.engine.shards import proven_digest
from rlsys.engine.start import Device, engine_processes, preload, prepare_environment
from rlsys.engine.workers import values
from rlsys.errors import ActorDiedError, ActorFailedError, ConfigError, SamplingError, WeightSyncError
from rlsys.rollouts import Rollouts
from rlsys.types import Array, SamplingParams
from rlsys.weights import AdapterSnapshot, Attestation, WeightUpdate

__all__ = ["Sampler", "SamplerStats", "preload", "prepare_environment"]

BASE_VERSION = -1
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # slot widths that vLLM offers
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNEMBEDDING = "lm_head"
CPU_BLOCK_TOKENS = 32  # of the prefix cache: the smallest that the CPU attention takes; vLLM's own default is 128
WARM_UP_TOKENS = 64  # a fresh bf16 CPU engine dies of an illegal instruction when its first prompt is a few tokens
DEATH_POLL_S = 1.0
GIB = 2**30
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9}  # relative error of one rounding


@dataclass(slots=True)
class Adapter:
    """One version in the engine. Its id is never used again, so no cached prefix can outlive it."""

    id: int
    request: Any  # vLLM's LoRARequest
    running: int = 0
    work: set[asyncio.Future[Any]] = field(default_factory=set)  # of its running calls
    rewound: bool = False


@dataclass(frozen=True, slots=True)
class SamplerStats:
    name: str
    tokens_generated: int  # since the start, completions only
    running_requests: int
    live: tuple[tuple[str, int], ...]  # (run id, version), oldest first
    noise: float  # nats: how far this engine strays from itself
    start_s: float


class Sampler:
    """One engine. All methods may run concurrently on one event loop; versions are served only once attested."""

    def __init__(
        self,
        *,
        name: str,
        base: Path,
        model: ModelSection,
        section: SamplerSection,
        seed: int,
        device: Device = "cpu",
    ) -> None:
        self._name, self._base, self._model, self._section, self._device = name, base, model, section, device
        self._seed = seed
        self._draws = itertools.count()
        self._ids = itertools.count(1)
        self._request_ids = itertools.count()
        self._calls = itertools.count()
        self._live: dict[tuple[str, int], Adapter] = {}
        self._strays: dict[str, float] = {}  # run id -> distance to the learner when last attested
        self._loading = asyncio.Lock()
        self._asleep = False
        self._engine: Any = None
        self._log: EngineLog
        self._pulse = EnginePulse()
        self._tokens_generated = self._running = 0
        self._noise = self._start_s = 0.0
        self._about = BaseModel(base)
        if self._about.max_positions is not None and model.max_length > self._about.max_positions:
            raise ConfigError(
                f"model.max_length: found {model.max_length}; {base} has positions for {self._about.max_positions}"
            )

    async def start(self) -> None:
        """Start the engine, warm it up, and measure how far it strays from itself."""
        began = time.perf_counter()
        prepare_environment(self._section, self._device)
        preload(self._device)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._log = EngineLog()
        try:
            with engine_processes(self._device):
                self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self.engine_arguments()))
        except RuntimeError as error:  # of the engine's process, which vLLM does not hand over
            raise ActorFailedError(
                f"sampler {self._name}: the vLLM engine did not start on {self._base}: {self._log.cause()}"
            ) from error
        self._pulse.watch(self._engine)
        self._noise = await self._alive(self._measure_noise())
        self._start_s = time.perf_counter() - began

    def engine_arguments(self) -> dict[str, Any]:
        """What vLLM is started with; its own `LLM` takes the same."""
        section, cpu, parallel = self._section, self._device == "cpu", self._section.tensor_parallel_size
        # One position more than promised: vLLM wants to generate a token even where a full-length sequence is only
        # scored. That token is never fed back, so its position is never computed.
        max_model_len = self._model.max_length + 1
        by_device: dict[str, Any] = (
            {
                "distributed_executor_backend": "uni" if parallel == 1 else "rlsys.engine.parallel.CpuExecutor",
                "worker_cls": "rlsys.engine.cpu.CpuWorker",
                "block_size": CPU_BLOCK_TOKENS,
                "kv_cache_memory_bytes": int(section.kv_cache_gb * GIB) // parallel,  # of each worker
                # a seeded request whose prefill is cut in two kills the CPU engine ("does not use offset")
                "enable_chunked_prefill": False,
            }
            if cpu
            else {
                "gpu_memory_utilization": section.gpu_memory_utilization,
                "enable_sleep_mode": section.colocate,
                # left to itself, vLLM would ask Ray for workers in our placement group, where no GPU is left
                **({"distributed_executor_backend": "mp"} if parallel > 1 else {}),
            }
        )
        return {
            "model": str(self._base),
            "dtype": self._model.dtype,
            "seed": self._seed,
            "tensor_parallel_size": parallel,
            "max_model_len": max_model_len,
            "max_num_seqs": section.max_num_seqs,
            "max_num_batched_tokens": max(section.max_num_batched_tokens, max_model_len),
            "enforce_eager": cpu or section.enforce_eager,
            "enable_prefix_caching": True,
            "skip_tokenizer_init": not self._about.has_tokenizer,
            "generation_config": "vllm",  # else the model's own file would change temperature, top_k and top_p
            "logprobs_mode": "processed_logprobs",  # of the distribution that was drawn from
            "enable_lora": True,
            "max_loras": section.max_live_adapters,
            "max_cpu_loras": section.max_live_adapters,
            "max_lora_rank": next(rank for rank in ENGINE_RANKS if rank >= section.max_lora_rank),
            "lora_target_modules": [*LINEARS, UNEMBEDDING] if cpu else [*LINEARS],
            "worker_extension_cls": "rlsys.engine.adapters.AdapterExtension",
            "disable_log_stats": True,
            **by_device,
        }

    async def _measure_noise(self) -> float:
        """Mean |difference| of one sequence scored alone and in company, and at least one rounding of its values.

        A learner computes the same in another order, so it strays by about a rounding even where the engine agrees with
        itself (measured against transformers: 0.8 of that in bfloat16).
        """
        tokens = np.arange(min(WARM_UP_TOKENS, self._model.max_length), dtype=np.int32) * 7 % self._about.vocab_size
        alone = await self._score(tokens, None)
        company = await _together([self._score(np.roll(tokens, shift), None) for shift in range(8)])
        return max(distance(alone, company[0]), float(np.abs(alone).mean()) * ROUNDOFF[self._model.dtype])

    async def sample(
        self,
        problems: Array,
        prompt_tokens: Array,
        prompt_offsets: Array,
        n: int,
        params: SamplingParams,
        run_id: str | None,
        version: int,
    ) -> Rollouts:
        """n completions of each of P prompts under one version (`run_id` None and version -1: the base).

        A group is one engine request. `params.seed` None draws from this sampler's own sequence; else the same problems
        draw the same. Greedy requests (temperature 0) are computed once and copied; their log-probabilities are those
        at temperature 1. Stop tokens, but not stop strings' tails, are part of a completion.

        Raises:
            SamplingError: nothing was started.
        """
        if n < 1:
            raise SamplingError(f"n: found {n}; wanted at least 1")
        max_length, vocab_size = self._model.max_length, self._about.vocab_size
        names = problems.tolist()
        check_sequences("problem", names, prompt_tokens, prompt_offsets, params.max_tokens, max_length, vocab_size)
        seed = params.seed if params.seed is not None else self._own_seed()
        children = n if params.temperature > 0 else 1
        requests = [engine_params(params, children, group, self._about) for group in group_seeds(seed, problems)]
        with self._using(run_id, version, len(requests)) as adapter:
            prompts = _rows(prompt_tokens, prompt_offsets)
            outputs = await self._work(
                [self._generate(*pair, adapter) for pair in zip(prompts, requests, strict=True)], adapter
            )
        rollouts = columns(problems, prompt_tokens, prompt_offsets, n, outputs, version)
        self._tokens_generated += len(rollouts.tokens)
        return rollouts

    async def logprobs(self, tokens: Array, offsets: Array, run_id: str | None, version: int) -> Array:
        """(T,) float32: log-probability of each token of each sequence given those before it; 0.0 for each first one.

        At temperature 1, whatever the sequences were drawn with.

        Raises:
            SamplingError: nothing was started.
        """
        count = len(offsets) - 1
        max_length, vocab_size = self._model.max_length, self._about.vocab_size
        check_sequences("sequence", range(count), tokens, offsets, 0, max_length, vocab_size)
        with self._using(run_id, version, count) as adapter:
            rows = [self._score(np.asarray(row), adapter) for row in _rows(tokens, offsets)]
            scored = await self._work(rows, adapter)
        scores = np.zeros(len(tokens), np.float32)
        later = np.ones(len(tokens), np.bool_)
        later[offsets[:-1]] = False
        scores[later] = np.concatenate(scored) if scored else []
        return scores

    async def load(self, update: WeightUpdate, bound: float) -> Attestation:
        """Install a version, prove from the engine's own slots and from its canary that it is served, then serve it.

        Raises:
            WeightSyncError: it is not, and the version was taken out again.
        """
        async with self._loading:
            began = time.perf_counter()
            snapshot = update.snapshot
            self._refuse_asleep()
            self._refuse_unloadable(snapshot)
            await self._make_room(snapshot.run_id)
            adapter = self._new_adapter(snapshot)
            try:
                digest = await self._install(snapshot, adapter)
                scored = await self._alive(self._score(update.canary_tokens, adapter))
                noise = max(self._noise, self._strays.get(snapshot.run_id, 0.0))
                seconds = time.perf_counter() - began
                attestation = attest(self._name, update, digest, scored, noise, bound, seconds)
            except BaseException:
                await asyncio.shield(self._call("rlsys_remove_adapter", adapter.id))
                raise
            self._live[snapshot.run_id, snapshot.version] = adapter
            self._strays[snapshot.run_id] = attestation.distance_new
            return attestation

    async def probe(self, update: WeightUpdate, bound: float) -> Attestation:
        """Prove at start-up, with an adapter whose B is large, that adapters reach the forward pass; nothing stays.

        Raises:
            WeightSyncError: they do not, or the adapter was too small to tell.
        """
        attestation = await self.load(update, bound)
        await self.unload(attestation.run_id, attestation.version)
        if not attestation.has_power:
            raise WeightSyncError(
                f"sampler {self._name}: the probe's versions are {attestation.separation:.3g} nats apart, "
                f"within the engine's noise of {self._noise:.3g}; wanted a larger B"
            )
        return attestation

    async def unload(self, run_id: str, version: int) -> None:
        """Take a version out.

        Raises:
            SamplingError: it is not there, or requests still run on it.
        """
        adapter = self._adapter(run_id, version)
        if adapter.running:
            raise SamplingError(
                f"sampler {self._name}: run {run_id!r} version {version} still has {adapter.running} running requests"
            )
        del self._live[run_id, version]
        await self._call("rlsys_remove_adapter", adapter.id)

    async def rewind(self, run_id: str) -> None:
        """Abort the run's requests and take all its versions out; the same versions may then be loaded anew.

        A learner that went back to a checkpoint gives other weights the numbers that these had.
        """
        async with self._loading:
            mine = {key: adapter for key, adapter in self._live.items() if key[0] == run_id}
            for key, adapter in mine.items():
                del self._live[key]
                adapter.rewound = True
                for work in adapter.work:
                    work.cancel()
            self._strays.pop(run_id, None)
            for adapter in mine.values():
                await asyncio.gather(*adapter.work, return_exceptions=True)  # until the engine has let go of them
                await self._call("rlsys_remove_adapter", adapter.id)

    async def sleep(self) -> None:
        """Give the GPU's memory to the learner beside it, until `wake`. On CPU there is none to give, and nothing is
        done. Not run on a GPU yet; read in vLLM 0.32:

        At level 1 the pool "weights" moves to pinned host memory and comes back to the same addresses
        (device_allocator/sleep_mode_backend.py and cumem.py). Adapters' slots belong to it, since they are made while
        the model loads (v1/worker/gpu_worker.py load_model), so every attested version is still there on waking. The
        KV cache is thrown away, and the prefix cache with it (v1/engine/core.py sleep). vLLM would abort what runs and
        queue what comes later without end: both are refused here.

        Raises:
            SamplingError: requests still run.
        """
        async with self._loading:
            if self._running:
                raise SamplingError(
                    f"sampler {self._name}: found {self._running} running requests; wanted none before it sleeps"
                )
            if self._device == "cpu" or self._asleep:
                return
            self._asleep = True
            await self._alive(self._unless_dead(self._engine.sleep(level=1, mode="abort")))
            self._pulse.answered += 1

    async def wake(self) -> None:
        """Take the memory back and serve again; nothing where it is awake. The same versions are live as before."""
        async with self._loading:
            if self._asleep:
                await self._alive(self._unless_dead(self._engine.wake_up()))
                self._pulse.answered += 1
                self._asleep = False

    def _refuse_asleep(self) -> None:
        if self._asleep:
            raise SamplingError(f"sampler {self._name}: is asleep; wanted wake() first")

    async def stop(self) -> None:
        """End the engine and its process."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()  # on this thread: it cancels a task of this loop

    async def progress(self) -> tuple[int, int]:
        """Differs from the last answer if the engine has moved; asks nothing of the engine, so it cannot hang."""
        return self._pulse.advanced, self._pulse.answered

    def stats(self) -> SamplerStats:
        live = tuple(self._live)
        return SamplerStats(self._name, self._tokens_generated, self._running, live, self._noise, self._start_s)

    def _own_seed(self) -> int:
        words = [self._seed, next(self._draws)]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])

    def _adapter(self, run_id: str, version: int) -> Adapter:
        adapter = self._live.get((run_id, version))
        if adapter is None:
            live = ", ".join(f"{run!r} {v}" for run, v in self._live) or "none"
            raise SamplingError(
                f"sampler {self._name}: run {run_id!r} version {version} is not loaded; live run and version: {live}"
            )
        return adapter

    @contextmanager
    def _using(self, run_id: str | None, version: int, requests: int) -> Iterator[Adapter | None]:
        """The adapter of a version, which is not evicted while inside; None for the base."""
        if run_id is None and version != BASE_VERSION:
            raise SamplingError(f"version: found {version} without a run; the base is version {BASE_VERSION}")
        self._refuse_asleep()
        adapter = None if run_id is None else self._adapter(run_id, version)
        self._running += requests
        if adapter is not None:
            adapter.running += requests
        try:
            yield adapter
        finally:
            self._running -= requests
            if adapter is not None:
                adapter.running -= requests

    async def _generate(self, prompt: list[int], params: Any, adapter: Adapter | None) -> Any:
        """One finished engine request; aborted in the engine when this task is cancelled."""
        request_id = f"{self._name}-{next(self._request_ids)}"
        lora = None if adapter is None else adapter.request
        # "type" marks the prompt as rendered, which spares it vLLM's preprocessing threads
        inputs = {"type": "token", "prompt_token_ids": prompt}
        final = None
        async for output in self._engine.generate(inputs, params, request_id, lora_request=lora):
            final = output
        return final

    async def _score(self, tokens: Array, adapter: Adapter | None) -> Array:
        """(T - 1,) log-probabilities of tokens 1..T-1."""
        output = await self._generate(tokens.tolist(), score_params(), adapter)
        return np.asarray(output.prompt_logprobs.logprobs, np.float32)

    async def _work(self, requests: Sequence[Any], adapter: Adapter | None) -> list[Any]:
        """All results; none and an error where the adapter's run was rewound meanwhile."""
        work = asyncio.ensure_future(self._alive(_together(requests)))
        held = set() if adapter is None else adapter.work
        held.add(work)
        try:
            results: list[Any] = await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if adapter is not None and adapter.rewound and not task.cancelling():
                raise SamplingError(
                    f"sampler {self._name}: adapter {adapter.request.lora_name} was taken out while it worked, because "
                    "its run went back to an earlier step"
                ) from None
            raise
        finally:
            held.discard(work)
        return results

    async def _alive(self, work: Awaitable[Any]) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return await work
        except (EngineDeadError, EngineGenerateError) as error:
            cause = self._log.cause() if isinstance(error, EngineDeadError) else error.__cause__ or error
            raise ActorDiedError(f"sampler {self._name}: the vLLM engine failed: {cause}") from error

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """What each tensor-parallel worker answered to `method` of rlsys.engine.adapters, by rank."""
        number = next(self._calls)
        asked = self._engine.collective_rpc("rlsys_answer", args=(number, method, args))
        answers = await self._alive(self._unless_dead(asked))
        self._pulse.answered += 1
        return values(f"sampler {self._name}", method, number, answers, self._section.tensor_parallel_size)

    async def _unless_dead(self, call: Awaitable[Any]) -> Any:
        """vLLM fails the requests of an engine that dies, but leaves calls of its worker waiting for ever."""
        from vllm.v1.engine.exceptions import EngineDeadError

        answer = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait([answer], timeout=DEATH_POLL_S))[0]:
                if self._engine.errored:
                    raise EngineDeadError
            return answer.result()
        finally:
            answer.cancel()

    def _refuse_unloadable(self, snapshot: AdapterSnapshot) -> None:
        where = f"sampler {self._name}, run {snapshot.run_id!r}, version {snapshot.version}"
        if (snapshot.run_id, snapshot.version) in self._live:
            raise WeightSyncError(f"{where}: is already served; wanted a new version")
        if snapshot.rank > self._section.max_lora_rank:
            raise WeightSyncError(
                f"{where}: found rank {snapshot.rank}; "
                f"wanted at most sampler.max_lora_rank = {self._section.max_lora_rank}"
            )
        if snapshot.dtype != self._model.dtype:
            raise WeightSyncError(f"{where}: found {snapshot.dtype}; wanted model.dtype {self._model.dtype}")
        if self._device != "cpu" and any(UNEMBEDDING in slot.name for slot in snapshot.layout):
            raise WeightSyncError(
                f"{where}: holds {UNEMBEDDING} tensors; vLLM's GPU LoRA has no mapping for the rows of prompt "
                "log-probabilities there and would score them wrong; set lora.train_unembed: false"
            )

    async def _make_room(self, run_id: str) -> None:
        """Evict the oldest idle versions that are not the last of their run."""
        while len(self._live) >= self._section.max_live_adapters:
            last = dict(self._live.keys())  # run id -> version loaded last
            idle = [key for key, adapter in self._live.items() if not adapter.running and last[key[0]] != key[1]]
            if not idle:
                raise WeightSyncError(
                    f"sampler {self._name}: no room for run {run_id!r}: {len(self._live)} versions are live, each "
                    "the last of its run or with running requests; raise sampler.max_live_adapters"
                )
            await self.unload(*idle[0])

    def _new_adapter(self, snapshot: AdapterSnapshot) -> Adapter:
        from vllm.lora.request import LoRARequest

        number = next(self._ids)
        name = f"{snapshot.run_id}/{snapshot.version}#{number}"  # part of the prefix cache's key
        return Adapter(number, LoRARequest(lora_name=name, lora_int_id=number, lora_path=name))

    async def _install(self, snapshot: AdapterSnapshot, adapter: Adapter) -> str:
        """The digest of the engine's slots after installing; of several workers' slots, once each proved its part."""
        where = f"sampler {self._name}, run {snapshot.run_id!r}, version {snapshot.version}"
        layout = [(slot.name, list(slot.shape), slot.offset, slot.nbytes) for slot in snapshot.layout]
        add = (adapter.id, snapshot.rank, snapshot.dtype, layout, snapshot.buffer.tobytes())
        alone = self._section.tensor_parallel_size == 1
        try:
            await self._call("rlsys_add_adapter", *add)
            held = await self._call("rlsys_read_back" if alone else "rlsys_read_part", adapter.id, layout)
        except ActorDiedError:
            raise
        except Exception as error:
            raise WeightSyncError(f"{where}: not installed: {error}") from error
        digest: str = held[0] if alone else await asyncio.to_thread(proven_digest, where, snapshot, held)
        return digest


def _rows(tokens: Array, offsets: Array) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, offsets[1:-1])] if len(offsets) > 1 else []


async def _together(work: Sequence[Any]) -> list[Any]:
    """All results, or the first error with all the others cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
