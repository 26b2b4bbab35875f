"""A sampler engine for snapshots of many runs, addressed by key. Each request has one prompt."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

import numpy as np

from rlsys.client.backend import SampleAnswer
from rlsys.sampler.engine import BASE_VERSION, Sampler
from rlsys.sampler.requests import check_sequences
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.update import Attestation, WeightUpdate

ONE = np.zeros(1, np.int64)


class SnapshotEngine(Sampler):
    """Run id and version do not identify a snapshot: numbers repeat between runs and after load_state. The key does."""

    def own_seed(self) -> int:
        """A random seed from the system: calls without a seed differ between calls and sessions."""
        return secrets.randbits(63)

    async def serve(self, key: str, update: WeightUpdate, bound: float | None) -> Attestation:
        """As `load`."""
        return await self.load(replace(update, snapshot=replace(update.snapshot, run_id=key, version=0)), bound)

    async def withdraw(self, key: str) -> None:
        await self.unload(key, 0)

    async def answer(
        self, key: str | None, prompt: Array, n: int, params: SamplingParams, prompt_logprobs: bool, topk: int
    ) -> SampleAnswer:
        """n completions of one prompt (N,), and the log-probabilities of the prompt itself at temperature 1."""
        version = BASE_VERSION if key is None else 0
        offsets = np.array([0, len(prompt)], np.int64)
        rollouts = await self.sample(ONE, prompt, offsets, n, params, key, version)
        scores = await self.score(key, prompt) if prompt_logprobs else None
        ids, values = await self.likeliest(key, prompt, topk) if topk else (None, None)
        return SampleAnswer(
            rollouts.tokens, rollouts.logprobs, rollouts.offsets, rollouts.stop_reasons, scores, ids, values
        )

    async def score(self, key: str | None, tokens: Array) -> Array:
        """(N,) float32, 0 for the first."""
        version = BASE_VERSION if key is None else 0
        return await self.logprobs(tokens, np.array([0, len(tokens)], np.int64), key, version)

    async def likeliest(self, key: str | None, tokens: Array, k: int) -> tuple[Array, Array]:
        """(N - 1, k) ids and nats of the k likeliest tokens in place of tokens 1..N-1, best first."""
        offsets = np.array([0, len(tokens)], np.int64)
        check_sequences("prompt", [0], tokens, offsets, 0, self._model.max_length, self._about.vocab_size)
        with self._using(key, BASE_VERSION if key is None else 0, 1) as adapter:
            output = await self._alive(self._generate(tokens.tolist(), _topk_params(k), adapter))
        found = output.prompt_logprobs
        rows = [_best(found, position, k) for position in range(1, len(tokens))]
        ids = np.array([row[0] for row in rows], np.int32).reshape(-1, k)
        return ids, np.array([row[1] for row in rows], np.float32).reshape(-1, k)


def _topk_params(k: int) -> Any:  # vllm.SamplingParams, which this module does not load before an engine runs
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        max_tokens=1,  # vLLM generates at least one token
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=k,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _best(found: Any, position: int, k: int) -> tuple[list[int], list[float]]:  # vllm.logprobs.FlatLogprobs
    """vLLM lists the prompt's token first, then the k likeliest, which may include that token again."""
    start, end = found.start_indices[position], found.end_indices[position]
    ids, values = found.token_ids[start:end], found.logprobs[start:end]
    return ids[1 : k + 1], values[1 : k + 1]
