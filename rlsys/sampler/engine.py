"""A vLLM engine: samples completions, scores tokens, and serves adapter versions once it has attested them.

vLLM is imported when an engine starts, not with this module, because `prepare_environment` must run first.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.architectures.families import family_of
from rlsys.architectures.model_shape import read_config
from rlsys.architectures.support import unembedding_problem
from rlsys.config import ModelSection, SamplerSection
from rlsys.errors import ActorDiedError, ActorFailedError, ConfigError, SamplingError, WeightSyncError
from rlsys.rollouts import Rollouts
from rlsys.sampler.adapter_slots import BASE_VERSION, Adapter, AdapterLease, AdapterSlots, kept
from rlsys.sampler.completion import Completion, join_completions, to_rollouts
from rlsys.sampler.engine_args import engine_arguments
from rlsys.sampler.engine_start import Device, engine_processes, preload, prepare_environment
from rlsys.sampler.heartbeat import EngineHeartbeat
from rlsys.sampler.postmortem import EngineLog, refusal
from rlsys.sampler.requests import (
    BaseModel,
    check_sequences,
    child_seeds,
    columns,
    engine_params,
    finished,
    group_seeds,
    later_seed,
    position_logprob,
    position_params,
    score_params,
    so_far,
)
from rlsys.sampler.stop_strings import stop_across
from rlsys.sampler.vllm.lora_shards import proven_digest
from rlsys.sampler.vllm.model_classes import register_classes
from rlsys.sampler.vllm.shared_buffer import to_shared_buffer
from rlsys.sampler.vllm.worker_calls import values
from rlsys.types import Array, SamplingParams
from rlsys.utils.text_files import plain_path
from rlsys.weight_sync.attest import attest, attest_base, distance
from rlsys.weight_sync.canary import BOUND_FACTOR, StartupProbe
from rlsys.weight_sync.update import AdapterSnapshot, Attestation, WeightUpdate

__all__ = ["BASE_VERSION", "Sampler", "SamplerStats", "preload", "prepare_environment"]

WARM_UP_TOKENS = 64  # a fresh bf16 CPU engine dies of an illegal instruction when its first prompt is a few tokens
DEATH_POLL_S = 1.0
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}  # relative error of one rounding


@dataclass(frozen=True, slots=True)
class SamplerStats:
    name: str
    tokens_generated: int  # since the start, completions only
    running_requests: int
    live: tuple[tuple[str, int], ...]  # (run id, version), oldest first
    noise: float  # nats: how far this engine's own results differ
    start_s: float


class Sampler:
    """One engine. All methods may run concurrently on one event loop. A version is served only once it is attested."""

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
        self._request_ids = itertools.count()
        self._calls = itertools.count()
        self._live = AdapterSlots(f"sampler {name}", section.max_live_adapters)
        self._strays: dict[str, float] = {}  # run id -> distance to the learner when last attested
        self._loading = asyncio.Lock()
        self._asleep = False
        self._engine: Any = None
        self._log: EngineLog
        self._pulse = EngineHeartbeat()
        self._tokens_generated = self._running = 0
        self._noise = self._start_s = 0.0
        self._about = BaseModel(base)
        # read now: the folder of a base that came through Ray is gone once the engine has loaded it
        self._family = family_of(read_config(base))
        if self._about.max_positions is not None and model.max_length > self._about.max_positions:
            raise ConfigError(
                f"model.max_length: found {model.max_length}; {base} has positions for {self._about.max_positions}"
            )

    @property
    def end_ids(self) -> Sequence[int]:
        """Tokens that end a completion where `SamplingParams.stop` gives no ids."""
        return self._about.endings.ids

    async def start(self) -> None:
        """Start the engine, warm it up, and measure its noise."""
        began = time.perf_counter()
        prepare_environment(self._section, self._device)
        preload(self._device)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if self._device == "cpu":
            register_classes(self._base)
        self._log = EngineLog()
        try:
            with engine_processes(self._device), plain_path(self._base) as folder:  # vLLM globs for the weights
                arguments = {**self.engine_arguments(), "model": str(folder)}
                self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except RuntimeError as error:  # of the engine's process, which vLLM does not hand over
            raise ActorFailedError(
                f"sampler {self._name}: the vLLM engine did not start on {self._base}: {self._log.cause()}"
            ) from error
        except ValueError as error:  # vLLM refused it before it made a process
            raise ActorFailedError(f"sampler {self._name}: vLLM refused {self._base}: {refusal(error)}") from error
        self._pulse.watch(self._engine)
        self._noise = await self._alive(self._measure_noise())
        self._start_s = time.perf_counter() - began

    def engine_arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments; `vllm.LLM` takes the same."""
        has_tokenizer = self._about.has_tokenizer
        return engine_arguments(self._base, self._model, self._section, self._seed, self._device, has_tokenizer)

    async def _measure_noise(self) -> float:
        """Mean |difference| of one sequence scored alone and in a batch, and at least one rounding of its values.

        A learner computes in another order, so it differs by about one rounding even if the engine agrees with itself
        (measured against transformers: 0.8 of that in bfloat16).
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
        move_on: bool = False,
        occurrence: Array | None = None,
    ) -> Rollouts:
        """n completions of each of P prompts under one version (`run_id` None and version -1: the base).

        `params.seed` None: seeds come from this sampler's sequence. Else a completion is a function of the seed, the
        problem and its occurrence. `occurrence`: (P,) how often each problem was sampled before; None: count repeats in
        `problems`. Greedy requests (temperature 0) are computed once and copied; their log-probabilities are those at
        temperature 1. Stop tokens, but not stop strings' tails, are part of a completion. `move_on`: switch unfinished
        completions to each newly loaded version of the run. Only then can one completion mix versions.

        Raises:
            SamplingError: nothing was started.
        """
        if n < 1:
            raise SamplingError(f"n: found {n}; wanted at least 1")
        max_length, vocab_size = self._model.max_length, self._about.vocab_size
        names = problems.tolist()
        check_sequences("problem", names, prompt_tokens, prompt_offsets, params.max_tokens, max_length, vocab_size)
        seed = params.seed if params.seed is not None else self.own_seed()
        children = n if params.temperature > 0 else 1
        prompts = _rows(prompt_tokens, prompt_offsets)
        if move_on and run_id is not None:
            seeds = iter(child_seeds(seed, problems, children, occurrence))
            with self.hold(run_id, version, len(prompts), moves=True) as hold:
                ones = [replace(params, seed=next(seeds)) for _ in range(len(prompts) * children)]
                rows = [prompt for prompt in prompts for _ in range(children)]
                draws = [self.draw(hold, row, one) for row, one in zip(rows, ones, strict=True)]
                done = [one for one in await _together(draws) for _ in range(n // children)]
            return to_rollouts(problems, prompt_tokens, prompt_offsets, done)
        groups = group_seeds(seed, problems, occurrence)
        requests = [engine_params(params, children, group, self._about) for group in groups]
        with self._using(run_id, version, len(requests)) as adapter:
            outputs = await self._work(
                [self._generate(*pair, adapter) for pair in zip(prompts, requests, strict=True)], adapter
            )
        rollouts = columns(problems, prompt_tokens, prompt_offsets, n, outputs, version)
        self._tokens_generated += len(rollouts.tokens)
        return rollouts

    @contextmanager
    def hold(self, run_id: str | None, version: int, requests: int, moves: bool = False) -> Iterator[AdapterLease]:
        """Lease a version for several calls of `draw`: it is not evicted inside the block, unless the calls move on.

        Raises:
            SamplingError: it is not live.
        """
        self._refuse_asleep()
        hold = self._live.hold(run_id, version, moves)
        self._running += requests
        try:
            with kept(None if moves else hold.adapter, requests):
                yield hold
        finally:
            self._running -= requests

    async def draw(
        self, hold: AdapterLease, prompt: list[int], params: SamplingParams, also_stop: Sequence[str] = ()
    ) -> Completion:
        """One completion of one prompt; `params.seed` is its own, and `also_stop` adds to `params.stop`.

        Raises:
            SamplingError: the run was rolled back, or there is no room for `params.max_tokens`.
        """
        assert params.seed is not None
        length = np.array([0, len(prompt)], np.int64)
        check_sequences(
            "prompt", [0], np.asarray(prompt), length, params.max_tokens, self._model.max_length, self._about.vocab_size
        )
        parts: list[Completion] = []
        done, seed, before = 0, params.seed, list[int]()
        while True:
            adapter = self._live.serving(hold)
            left = replace(params, max_tokens=params.max_tokens - done)
            request = engine_params(left, 1, seed, self._about, also_stop)
            with kept(adapter, 1):
                (output,) = await self._work([self._generate(prompt + before, request, adapter, hold.moves)], adapter)
            if output is None:
                continue
            (completion,) = output.outputs
            version = hold.version if adapter is None else adapter.version
            moves_on = hold.moves and completion.finish_reason == "abort"
            part = so_far(completion, version) if moves_on else finished(completion, version)
            self._tokens_generated += len(part.tokens)
            tail = part.tokens.tolist()
            cut = stop_across(self._decode, before, tail, request.stop) if parts and request.stop else None
            parts.append(part if cut is None else part.head(cut, stopped=True))
            if cut is not None or not moves_on:
                return join_completions(parts)
            before = before + tail
            done = len(before)
            seed = later_seed(params.seed, done)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._engine.get_tokenizer().decode(tokens, skip_special_tokens=True)
        return text

    async def logprobs(self, tokens: Array, offsets: Array, run_id: str | None, version: int) -> Array:
        """(T,) float32: log-probability of each token of each sequence given those before it; 0.0 for each first one.

        At temperature 1, whatever temperature the sequences were sampled with.

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

    async def load(self, update: WeightUpdate, bound: float | None = None) -> Attestation:
        """Install a version, prove by a hash of the engine's slots and by the canary that it is served, then serve it.

        `bound`: nats by which the canary may differ; None: what the noise of learner and engine explains.

        Raises:
            WeightSyncError: the proof failed; the version was unloaded again.
        """
        async with self._loading:
            began = time.perf_counter()
            snapshot = update.snapshot
            self._refuse_asleep()
            self._refuse_unloadable(snapshot)
            leaving = []
            while (key := self._live.in_the_way(snapshot.run_id)) is not None:
                leaving.append(self._live.drop(*key).id)
            adapter = self._live.make(snapshot)
            try:
                digest = await self._install(snapshot, adapter, leaving)
                scored = await self._alive(self._score(update.canary_tokens, adapter))
                noise = max(self._noise, self._strays.get(snapshot.run_id, 0.0))
                seconds = time.perf_counter() - began
                allowed = bound or max(update.bound, BOUND_FACTOR * self._noise)
                attestation = attest(self._name, update, digest, scored, noise, allowed, seconds)
            except BaseException:
                for gone in (*leaving, adapter.id):
                    await asyncio.shield(self._call("rlsys_remove_adapter", gone))
                raise
            self._strays[snapshot.run_id] = attestation.distance_new
            if moving := self._live.add(snapshot.run_id, adapter):
                await self._alive(self._engine.abort(moving))  # their tokens so far come back as output
            return attestation

    async def probe(self, probe: StartupProbe, bound: float | None = None) -> Attestation:
        """Prove at start-up that the base equals the learner's, at early and late positions, and that adapters reach
        the forward pass. The probe's adapter is unloaded afterwards.

        Raises:
            WeightSyncError: a proof failed, or the adapter's effect was within the engine's noise.
        """
        self._refuse_asleep()
        scored = await self._alive(self._score_at(probe.base.tokens, probe.base.positions))
        attest_base(self._name, probe.base, scored, self._noise, bound)
        attestation = await self.load(probe.update, bound)
        await self.unload(attestation.run_id, attestation.version)
        if not attestation.has_power:
            raise WeightSyncError(
                f"sampler {self._name}: the probe's versions are {attestation.separation:.3g} nats apart, "
                f"within the engine's noise of {self._noise:.3g}; wanted a larger B"
            )
        return attestation

    async def unload(self, run_id: str, version: int) -> None:
        """Unload a version.

        Raises:
            SamplingError: it is not loaded, or requests still run on it.
        """
        await self._call("rlsys_remove_adapter", self._live.drop(run_id, version).id)

    async def roll_back(self, run_id: str) -> None:
        """Abort the run's requests and unload all its versions; the same version numbers may then be loaded again.

        A learner that was rolled back to a checkpoint reuses these numbers for other weights.
        """
        async with self._loading:
            mine = self._live.roll_back(run_id)
            self._strays.pop(run_id, None)
            for adapter in mine:
                await asyncio.gather(*adapter.work, return_exceptions=True)  # until the engine has released them
                await self._call("rlsys_remove_adapter", adapter.id)

    async def sleep(self) -> None:
        """Free the GPU's memory for the learner until `wake`. Does nothing on a CPU. Not run on a GPU yet; read in vLLM
        0.32:

        At level 1 the pool "weights" moves to pinned host memory and comes back to the same addresses
        (device_allocator/sleep_mode_backend.py and cumem.py). Adapters' slots belong to it, since they are made while
        the model loads (v1/worker/gpu_worker.py load_model), so every attested version is still there on waking. The
        KV cache and the prefix cache are dropped (v1/engine/core.py sleep). vLLM would abort running requests and queue
        later ones without a limit: both are refused here.

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
        """Take the memory back and serve the same versions again. Does nothing if the engine is awake."""
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
        """Changes with the engine's work. Does not call the engine, so it cannot hang."""
        return self._pulse.advanced, self._pulse.answered

    def stats(self) -> SamplerStats:
        live = self._live.keys()
        return SamplerStats(self._name, self._tokens_generated, self._running, live, self._noise, self._start_s)

    def own_seed(self) -> int:
        """Seed of a call whose params have none."""
        words = [self._seed, next(self._draws)]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])

    @contextmanager
    def _using(self, run_id: str | None, version: int, requests: int) -> Iterator[Adapter | None]:
        """The adapter of a version, which is not evicted inside the block; None for the base."""
        with self.hold(run_id, version, requests) as hold:
            yield hold.adapter

    async def _generate(self, prompt: list[int], params: Any, adapter: Adapter | None, moves: bool = False) -> Any:
        """One finished engine request, aborted when this task is cancelled.

        `moves`: aborted also when a newer version is loaded; None if that happened before the request started.
        """
        request_id = f"{self._name}-{next(self._request_ids)}"
        lora = None if adapter is None else adapter.request
        # "type" marks the prompt as rendered, which spares it vLLM's preprocessing threads
        inputs = {"type": "token", "prompt_token_ids": prompt}
        final = None
        movable = adapter.movable if adapter is not None and moves else set()
        if adapter is not None and moves and adapter.overtaken:
            return None
        movable.add(request_id)
        try:
            async for output in self._engine.generate(inputs, params, request_id, lora_request=lora):
                final = output
        finally:
            movable.discard(request_id)
        return final

    async def _score(self, tokens: Array, adapter: Adapter | None) -> Array:
        """(T - 1,) log-probabilities of tokens 1..T-1."""
        output = await self._generate(tokens.tolist(), score_params(), adapter)
        return np.asarray(output.prompt_logprobs.logprobs, np.float32)

    async def _score_at(self, tokens: Array, positions: Array) -> Array:
        """(K,) log-probabilities under the base of the tokens at `positions`, each given all tokens before it.

        One request a position, on the prefix cache that the longest one leaves: scoring a whole prompt would make
        vLLM hold logits of all its positions at once.
        """
        ids = tokens.tolist()
        await self._generate(ids[: int(positions[-1])], position_params(ids[0]), None)
        outputs = await _together(
            [self._generate(ids[:at], position_params(ids[at]), None) for at in positions.tolist()]
        )
        return np.array([position_logprob(output, ids[at]) for output, at in zip(outputs, positions, strict=True)])

    async def _work(self, requests: Sequence[Any], adapter: Adapter | None) -> list[Any]:
        """All results. Raises SamplingError if the adapter's run was rolled back meanwhile."""
        work = asyncio.ensure_future(self._alive(_together(requests)))
        held = set() if adapter is None else adapter.work
        held.add(work)
        try:
            results: list[Any] = await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if adapter is not None and adapter.rolled_back and not task.cancelling():
                raise self._live.rolled_back(adapter) from None
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
        """Answers of the tensor-parallel workers to `method` of rlsys.sampler.vllm.adapter_worker, by rank."""
        number = next(self._calls)
        asked = self._engine.collective_rpc("rlsys_answer", args=(number, method, args))
        answers = await self._alive(self._unless_dead(asked))
        self._pulse.answered += 1
        return values(f"sampler {self._name}", method, number, answers, self._section.tensor_parallel_size)

    async def _unless_dead(self, call: Awaitable[Any]) -> Any:
        """Await a call of the engine's worker. When an engine dies, vLLM fails its requests but never answers these."""
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
        reason = unembedding_problem(self._about.vocab_size, self._family, self._device)
        if reason is not None and any(".layers." not in slot.name for slot in snapshot.layout):
            raise WeightSyncError(
                f"{where}: holds an adapter of the output layer: {reason}; set lora.train_unembed=false"
            )

    async def _install(self, snapshot: AdapterSnapshot, adapter: Adapter, leaving: Sequence[int]) -> str:
        """Install an adapter. Returns the digest of the engine's slots, of which each worker has proved its part."""
        where = f"sampler {self._name}, run {snapshot.run_id!r}, version {snapshot.version}"
        layout = [(slot.name, list(slot.shape), slot.offset, slot.nbytes) for slot in snapshot.layout]
        is_alone = self._section.tensor_parallel_size == 1
        try:
            with to_shared_buffer(snapshot.buffer) as path:
                held = await self._call(
                    "rlsys_install", adapter.id, snapshot.rank, snapshot.dtype, layout, path, leaving, is_alone
                )
        except ActorDiedError:
            raise
        except Exception as error:  # vLLM raises many types
            raise WeightSyncError(f"{where}: not installed: {error}") from error
        digest: str = held[0] if is_alone else await asyncio.to_thread(proven_digest, where, snapshot, held)
        return digest


def _rows(tokens: Array, offsets: Array) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, offsets[1:-1])] if len(offsets) > 1 else []


async def _together(work: Sequence[Any]) -> list[Any]:
    """All results, or the first error, with the others cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
