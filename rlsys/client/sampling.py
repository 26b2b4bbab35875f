"""Sampling client: samples from one immutable version of a policy, or from the base model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rlsys.client.backend import Deployment, SampleAnswer, SnapshotHandle
from rlsys.client.futures import ApiFuture, Ready
from rlsys.client.results import ScoredResponse, ShapedSequence
from rlsys.client.tokenizing import tokenizer_of
from rlsys.errors import SamplingError
from rlsys.rollouts import LENGTH
from rlsys.types import Array, ModelInput, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOPK = 20  # vLLM's limit

Found = TypeVar("Found")
Response = TypeVar("Response")


class SamplingClient(Ready):
    """Samples from one snapshot. Later training does not change its weights."""

    def __init__(self, deployment: Deployment, snapshot: SnapshotHandle | None, check_open: Callable[[], None]) -> None:
        self._deployment, self._snapshot, self._check_open = deployment, snapshot, check_open
        if snapshot is not None:
            weakref.finalize(self, deployment.release, snapshot).atexit = False

    @property
    def base_model(self) -> str:
        return self._deployment.about.base_model

    @property
    def model_path(self) -> str | None:
        """Path of the saved snapshot; None for the base and for a snapshot that exists only in memory."""
        return None if self._snapshot is None else self._snapshot.path

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> ApiFuture[ScoredResponse]:
        """Sample `num_samples` completions of a prompt. Completions of one call use different random numbers.

        ``sampling_params.seed`` None: random in every call and every session. With a seed, the same seed, prompt,
        `num_samples` and weights give the same tokens in every session, and so does temperature 0. On CPU in float32
        this is exact; elsewhere rounding can change a token.

        Prompt log-probabilities are nats at temperature 1, one per prompt token; the first is None.

        Raises:
            SamplingError: an argument is out of range. Errors that only the sampler can detect are raised by the
                future.
        """
        self._check_open()
        tokens = _tokens(prompt)
        if num_samples < 1:
            raise SamplingError(f"num_samples: found {num_samples}; wanted at least 1")
        if not 0 <= topk_prompt_logprobs <= MAX_TOPK:
            raise SamplingError(f"topk_prompt_logprobs: found {topk_prompt_logprobs}; wanted 0 to {MAX_TOPK}")
        answer = self._deployment.sample(
            self._snapshot, tokens, num_samples, sampling_params, include_prompt_logprobs, topk_prompt_logprobs
        )
        return self._future(answer, "sample", lambda found: _response(found, sampling_params))

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> ScoredResponse:
        return await self.sample(prompt, num_samples, sampling_params, include_prompt_logprobs, topk_prompt_logprobs)

    def compute_logprobs(self, prompt: ModelInput) -> ApiFuture[list[float | None]]:
        """Log-probability (nats, temperature 1) of each token of `prompt` given the tokens before it; None for the
        first."""
        self._check_open()
        answer = self._deployment.logprobs(self._snapshot, _tokens(prompt))
        return self._future(answer, "compute_logprobs", _prompt_logprobs)

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        return await self.compute_logprobs(prompt)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, loaded with transformers."""
        return tokenizer_of(self._deployment.about)

    def _future(self, answer: Future[Found], what: str, read: Callable[[Found], Response]) -> ApiFuture[Response]:
        return ApiFuture(answer, f"sampling client of {self.base_model}: {what}", read, self)


def _tokens(prompt: ModelInput) -> Array:
    if not isinstance(prompt, ModelInput):
        raise SamplingError(f"prompt: found a {type(prompt).__name__}; wanted ModelInput.from_ints(token_ids)")
    return prompt.to_numpy().astype(np.int32)


def _response(found: SampleAnswer, params: SamplingParams) -> ScoredResponse:
    sequences = [
        ShapedSequence(
            tokens=tokens.tolist(),
            logprobs=logprobs.tolist(),
            stop_reason="length" if reason == LENGTH else "stop",
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
        )
        for tokens, logprobs, reason in zip(
            np.split(found.tokens, found.offsets[1:-1]),
            np.split(found.logprobs, found.offsets[1:-1]),
            found.stop_reasons,
            strict=True,
        )
    ]
    topk = None
    if found.topk_tokens is not None and found.topk_logprobs is not None:
        pairs = zip(found.topk_tokens.tolist(), found.topk_logprobs.tolist(), strict=True)
        topk = [None, *(list(zip(ids, values, strict=True)) for ids, values in pairs)]
    return ScoredResponse(
        sequences=sequences,
        prompt_logprobs=None if found.prompt_logprobs is None else _prompt_logprobs(found.prompt_logprobs),
        topk_prompt_logprobs=topk,
    )


def _prompt_logprobs(found: Array) -> list[float | None]:
    values: list[float | None] = found.tolist()
    values[0] = None
    return values
