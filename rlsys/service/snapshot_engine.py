"""Snapshots of many runs on one sampler, addressed by key. Each request has one prompt."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from rlsys.answer_parts import AnswerParts, PartsRequest
from rlsys.client.backend import SampleAnswer
from rlsys.sampler.engine import BASE_VERSION, Sampler
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.update import Attestation, WeightUpdate

ONE = np.zeros(1, np.int64)
SNAPSHOT_VERSION = 0  # of each key


class SnapshotEngine:
    """Run id and version do not identify a snapshot: numbers repeat between runs and after load_state. The key does, so
    the sampler gets it as the run id."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    async def serve(self, key: str, update: WeightUpdate, bound: float | None) -> Attestation:
        """See ``AdapterLoader.load``."""
        snapshot = replace(update.snapshot, run_id=key, version=SNAPSHOT_VERSION)
        return await self._sampler.load(replace(update, snapshot=snapshot), bound)

    async def withdraw(self, key: str) -> None:
        await self._sampler.unload(key, SNAPSHOT_VERSION)

    async def answer(
        self, key: str | None, prompt: Array, n: int, params: SamplingParams, prompt_logprobs: bool, topk: int
    ) -> SampleAnswer:
        """n completions of one prompt (N,), and the log-probabilities of the prompt itself at temperature 1."""
        params, version = seeded(params), _version(key)
        if not (prompt_logprobs or topk):
            rollouts = await self._sampler.sample(ONE, prompt, _offsets(prompt), n, params, key, version)
            scores = None
        else:
            rollouts, scores = await self._sampler.sample_scored(prompt, n, params, topk, key, version)
        return SampleAnswer(
            rollouts.tokens,
            rollouts.logprobs,
            rollouts.offsets,
            rollouts.stop_reasons,
            scores.logprobs if scores is not None and prompt_logprobs else None,
            scores.topk_tokens if scores is not None and topk else None,
            scores.topk_logprobs if scores is not None and topk else None,
        )

    async def parts(self, key: str | None, request: PartsRequest) -> AsyncGenerator[AnswerParts, None]:
        """As `answer`, in parts as they are sampled."""
        request = replace(request, params=seeded(request.params))
        async with aclosing(self._sampler.sample_in_parts(request, key, _version(key))) as parts:
            async for part in parts:
                yield part

    async def score(self, key: str | None, tokens: Array) -> Array:
        """(N,) float32, 0 for the first."""
        return await self._sampler.logprobs(tokens, _offsets(tokens), key, _version(key))


def seeded(params: SamplingParams) -> SamplingParams:
    """`params` with a random seed from the system if they have none: such calls differ between calls and sessions."""
    return params if params.seed is not None else replace(params, seed=secrets.randbits(63))


def _version(key: str | None) -> int:
    return BASE_VERSION if key is None else SNAPSHOT_VERSION


def _offsets(tokens: Array) -> Array:
    """Of one sequence."""
    return np.array([0, len(tokens)], np.int64)
