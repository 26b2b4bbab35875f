"""Log-probabilities of given tokens under a version of an engine, and how far the engine's own scores differ."""

from __future__ import annotations

import numpy as np

from rlsys.architectures.precision import computing_dtype
from rlsys.sampler.adapter_slots import Adapter
from rlsys.sampler.request_runner import RequestRunner, together
from rlsys.sampler.requests import (
    BaseModel,
    check_sequences,
    position_logprob,
    position_params,
    rows_of,
    score_params,
)
from rlsys.sampler.vllm_engine import VllmEngine
from rlsys.types import Array
from rlsys.weight_sync.attest import distance

WARM_UP_TOKENS = 64  # a fresh bf16 CPU engine dies of an illegal instruction when its first prompt is a few tokens
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}  # relative error of one rounding


class Scorer:
    """Scores at temperature 1, whatever temperature the tokens were sampled with."""

    def __init__(self, engine: VllmEngine, runner: RequestRunner, about: BaseModel) -> None:
        self._engine, self._runner, self._about = engine, runner, about
        self._max_length = engine.model.max_length
        self._dtype = computing_dtype(engine.model.dtype, engine.device)
        self.noise = 0.0  # nats; 0 until it is measured

    async def logprobs(self, tokens: Array, offsets: Array, run_id: str | None, version: int) -> Array:
        """(T,) float32: log-probability of each token of each sequence given those before it; 0.0 for each first one.

        Raises:
            SamplingError: nothing was started.
        """
        count = len(offsets) - 1
        check_sequences("sequence", range(count), tokens, offsets, 0, self._max_length, self._about.vocab_size)
        with self._runner.using(run_id, version, count) as adapter:
            rows = [self.score(np.asarray(row), adapter) for row in rows_of(tokens, offsets)]
            scored = await self._runner.run(rows, adapter)
        scores = np.zeros(len(tokens), np.float32)
        later = np.ones(len(tokens), np.bool_)
        later[offsets[:-1]] = False
        scores[later] = np.concatenate(scored) if scored else []
        return scores

    async def score(self, tokens: Array, adapter: Adapter | None) -> Array:
        """(T - 1,) log-probabilities of tokens 1..T-1, without a lease of the adapter."""
        output = await self._runner.generate(tokens.tolist(), score_params(), adapter)
        return np.asarray(output.prompt_logprobs.logprobs, np.float32)

    async def score_at(self, tokens: Array, positions: Array) -> Array:
        """(K,) log-probabilities under the base of the tokens at `positions`, each given all tokens before it.

        One request a position, on the prefix cache that the longest one leaves: scoring a whole prompt would make
        vLLM hold logits of all its positions at once.
        """
        ids = tokens.tolist()
        await self._runner.generate(ids[: int(positions[-1])], position_params(ids[0]), None)
        outputs = await together(
            [self._runner.generate(ids[:at], position_params(ids[at]), None) for at in positions.tolist()]
        )
        return np.array([position_logprob(output, ids[at]) for output, at in zip(outputs, positions, strict=True)])

    async def measure_noise(self) -> None:
        """Set `noise`: mean |difference| of one sequence scored alone and in a batch, at least one rounding of its
        values. The first requests of an engine, so they also warm it up.

        A learner computes in another order, so it differs by about one rounding even if the engine agrees with itself
        (measured against transformers: 0.8 of that in bfloat16).
        """
        tokens = np.arange(min(WARM_UP_TOKENS, self._max_length), dtype=np.int32) * 7 % self._about.vocab_size
        alone = await self.score(tokens, None)
        company = await together([self.score(np.roll(tokens, shift), None) for shift in range(8)])
        self.noise = max(distance(alone, company[0]), float(np.abs(alone).mean()) * ROUNDOFF[self._dtype])
