"""A sampler: one vLLM engine that samples completions, scores tokens, and serves attested adapter versions."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlsys.answer_parts import AnswerParts, PartsRequest, PromptScores
from rlsys.architectures.families import family_of
from rlsys.architectures.model_shape import read_config
from rlsys.architectures.support import unembedding_problem
from rlsys.config import ModelSection, SamplerSection
from rlsys.errors import ConfigError, SamplingError
from rlsys.rollouts import Rollouts
from rlsys.sampler.adapter_loader import AdapterLoader
from rlsys.sampler.adapter_slots import BASE_VERSION, AdapterLease, AdapterSlots, kept
from rlsys.sampler.engine_start import Device, preload, prepare_environment
from rlsys.sampler.growing_completion import Completion, join_completions, to_rollouts
from rlsys.sampler.parts_sampler import PartsSampler
from rlsys.sampler.request_runner import RequestRunner, together
from rlsys.sampler.requests import (
    BaseModel,
    check_sequences,
    child_seeds,
    columns,
    engine_params,
    finished,
    group_seeds,
    later_seed,
    prompt_scores,
    rows_of,
    score_params,
    so_far,
)
from rlsys.sampler.scoring import Scorer
from rlsys.sampler.stop_strings import stop_across
from rlsys.sampler.vllm_engine import VllmEngine
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.canary import StartupProbe
from rlsys.weight_sync.update import Attestation, WeightUpdate

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

__all__ = ["BASE_VERSION", "Sampler", "SamplerStats", "preload", "prepare_environment"]


@dataclass(frozen=True, slots=True)
class SamplerStats:
    name: str
    tokens_generated: int  # since the start, completions only
    running_requests: int
    live: tuple[tuple[str, int], ...]  # (run id, version), oldest first
    noise: float  # nats: how far this engine's own results differ
    start_s: float


class Sampler:
    """One engine. All methods may run concurrently on one event loop. A version is served only once it is attested.

    `engine_class`: of the engine that is started.
    """

    def __init__(
        self,
        *,
        name: str,
        base: Path,
        model: ModelSection,
        section: SamplerSection,
        seed: int,
        device: Device = "cpu",
        engine_class: type[VllmEngine] = VllmEngine,
    ) -> None:
        self._name, self._model, self._seed = name, model, seed
        self._about = BaseModel(base)
        # read now: the folder of a base that came through Ray is gone once the engine has loaded it
        no_unembedding = unembedding_problem(self._about.vocab_size, family_of(read_config(base)), device)
        if self._about.max_positions is not None and model.max_length > self._about.max_positions:
            raise ConfigError(
                f"model.max_length: found {model.max_length}; {base} has positions for {self._about.max_positions}"
            )
        self.engine = engine_class(
            name=name,
            base=base,
            model=model,
            section=section,
            seed=seed,
            device=device,
            has_tokenizer=self._about.has_tokenizer,
        )
        self.slots = AdapterSlots(self.engine.where, section.max_live_adapters)
        self._runner = RequestRunner(self.engine, self.slots)
        self.scorer = Scorer(self.engine, self._runner, self._about)
        self._parts = PartsSampler(self._runner, self._about, model.max_length)
        self._loader = AdapterLoader(self.engine, self.slots, self._runner, self.scorer, no_unembedding)
        self._draws = itertools.count()
        self._tokens_generated = 0
        self._start_s = 0.0

    @property
    def end_ids(self) -> Sequence[int]:
        """Tokens that end a completion where `SamplingParams.stop` gives no ids."""
        return self._about.endings.ids

    async def start(self) -> None:
        """Start the engine, warm it up, and measure its noise."""
        began = time.perf_counter()
        self.engine.start()
        await self.engine.started()
        await self.engine.guarded(self.scorer.measure_noise())
        self._start_s = time.perf_counter() - began

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
        prompts = rows_of(prompt_tokens, prompt_offsets)
        if move_on and run_id is not None:
            seeds = iter(child_seeds(seed, problems, children, occurrence))
            with self.hold(run_id, version, len(prompts), moves=True) as hold:
                ones = [replace(params, seed=next(seeds)) for _ in range(len(prompts) * children)]
                rows = [prompt for prompt in prompts for _ in range(children)]
                draws = [self.draw(hold, row, one) for row, one in zip(rows, ones, strict=True)]
                done = [one for one in await together(draws) for _ in range(n // children)]
            return to_rollouts(problems, prompt_tokens, prompt_offsets, done)
        groups = group_seeds(seed, problems, occurrence)
        requests = [engine_params(params, children, group, self._about) for group in groups]
        with self._runner.using(run_id, version, len(requests)) as adapter:
            outputs = await self._runner.run(
                [self._runner.generate(*pair, adapter) for pair in zip(prompts, requests, strict=True)], adapter
            )
        rollouts = columns(problems, prompt_tokens, prompt_offsets, n, outputs, version)
        self._tokens_generated += len(rollouts.tokens)
        return rollouts

    async def sample_scored(
        self, prompt: Array, n: int, params: SamplingParams, topk: int, run_id: str | None, version: int
    ) -> tuple[Rollouts, PromptScores]:
        """As `sample` for one prompt, with the same completions for a seed, and the prompt's own scores.

        One completion and the scores are one request. Several completions share their prompt's cached prefix, which a
        request that scores cannot use, so the scores are a request beside them.
        """
        offsets, problem = np.array([0, len(prompt)], np.int64), np.zeros(1, np.int64)
        max_length, vocab_size = self._model.max_length, self._about.vocab_size
        check_sequences("prompt", [0], prompt, offsets, params.max_tokens, max_length, vocab_size)
        (seed,) = group_seeds(params.seed if params.seed is not None else self.own_seed(), problem)
        children = n if params.temperature > 0 else 1
        requests = [engine_params(params, children, seed, self._about, prompt_topk=topk if children == 1 else None)]
        if children > 1:
            requests.append(score_params(topk))
        with self._runner.using(run_id, version, len(requests)) as adapter:
            row = prompt.tolist()
            outputs = await self._runner.run(
                [self._runner.generate(row, request, adapter) for request in requests], adapter
            )
        rollouts = columns(problem, prompt, offsets, n, outputs[:1], version)
        self._tokens_generated += len(rollouts.tokens)
        return rollouts, prompt_scores(outputs[-1], topk)

    async def sample_in_parts(
        self, request: PartsRequest, run_id: str | None, version: int
    ) -> AsyncGenerator[AnswerParts, None]:
        """As `sample_scored`, with the same completions for a seed, in parts as they are sampled."""
        seed = request.params.seed if request.params.seed is not None else self.own_seed()
        (seed,) = group_seeds(seed, np.zeros(1, np.int64))
        async with aclosing(self._parts.answer(request, seed, run_id, version)) as answers:
            async for parts in answers:
                self._tokens_generated += sum(len(part.tokens) for part in parts.completions)
                yield parts

    def hold(
        self, run_id: str | None, version: int, requests: int, moves: bool = False
    ) -> AbstractContextManager[AdapterLease]:
        """Lease a version for several calls of `draw`: it is not evicted inside the block, unless the calls move on.

        Raises:
            SamplingError: it is not live, or the engine sleeps.
        """
        return self._runner.hold(run_id, version, requests, moves)

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
            adapter = self.slots.serving(hold)
            left = replace(params, max_tokens=params.max_tokens - done)
            request = engine_params(left, 1, seed, self._about, also_stop)
            with kept(adapter, 1):
                asked: Coroutine[object, None, RequestOutput | None]
                if adapter is not None and hold.moves:
                    asked = self._runner.generate_until_overtaken(prompt + before, request, adapter)
                else:
                    asked = self._runner.generate(prompt + before, request, adapter)
                (output,) = await self._runner.run([asked], adapter)
            if output is None:
                continue
            (completion,) = output.outputs
            version = hold.version if adapter is None else adapter.version
            moves_on = hold.moves and completion.finish_reason == "abort"
            part = so_far(completion, version) if moves_on else finished(completion, version)
            self._tokens_generated += len(part.tokens)
            tail = part.tokens.tolist()
            cut = stop_across(self.engine.decode, before, tail, request.stop) if parts and request.stop else None
            parts.append(part if cut is None else part.head(cut, stopped=True))
            if cut is not None or not moves_on:
                return join_completions(parts)
            before = before + tail
            done = len(before)
            seed = later_seed(params.seed, done)

    def own_seed(self) -> int:
        """Seed of a call whose params have none."""
        words = [self._seed, next(self._draws)]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])

    async def logprobs(self, tokens: Array, offsets: Array, run_id: str | None, version: int) -> Array:
        """See ``Scorer.logprobs``."""
        return await self.scorer.logprobs(tokens, offsets, run_id, version)

    async def load(self, update: WeightUpdate, bound: float | None = None) -> Attestation:
        """See ``AdapterLoader.load``."""
        return await self._loader.load(update, bound)

    async def probe(self, probe: StartupProbe, bound: float | None = None) -> Attestation:
        """See ``AdapterLoader.probe``."""
        return await self._loader.probe(probe, bound)

    async def unload(self, run_id: str, version: int) -> None:
        """See ``AdapterLoader.unload``."""
        await self._loader.unload(run_id, version)

    async def roll_back(self, run_id: str) -> None:
        """See ``AdapterLoader.roll_back``."""
        await self._loader.roll_back(run_id)

    async def sleep(self) -> None:
        """See ``AdapterLoader.sleep``."""
        await self._loader.sleep()

    async def wake(self) -> None:
        """See ``AdapterLoader.wake``."""
        await self._loader.wake()

    async def stop(self) -> None:
        """End the engine and its processes."""
        self.engine.stop()

    async def progress(self) -> tuple[int, int]:
        """Changes with the engine's work. Does not call the engine, so it cannot hang."""
        return self.engine.heartbeat.advanced, self.engine.heartbeat.answered

    def stats(self) -> SamplerStats:
        running, live, noise = self._runner.running, self.slots.keys(), self.scorer.noise
        return SamplerStats(self._name, self._tokens_generated, running, live, noise, self._start_s)
