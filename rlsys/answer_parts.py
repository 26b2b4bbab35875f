"""Answers that arrive in parts, while the engine samples: what is asked, and what one part holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlsys.types import Array, SamplingParams


@dataclass(frozen=True, slots=True)
class PartsRequest:
    """Completions of one prompt with their text, as they are sampled.

    ``also_stop``, ``also_stop_ids``: conditions beside those of ``params.stop``. Text ends before a stop condition;
    tokens include it.
    """

    prompt: Array  # (N,) int32
    n: int  # completions; 0: only score the prompt
    params: SamplingParams
    also_stop: tuple[str, ...] = ()
    also_stop_ids: tuple[int, ...] = ()
    topk: int = 0  # likeliest tokens beside each sampled one
    prompt_topk: int | None = None  # score the prompt, with so many of the likeliest tokens; None: do not
    incremental: bool = True  # False: each completion is one part, which costs less


@dataclass(frozen=True, slots=True)
class CompletionPart:
    """T further tokens of one completion. Text may lag behind tokens: it holds complete characters only, and nothing
    that may become a stop string."""

    index: int  # of the completion
    text: str
    tokens: Array  # (T,) int32
    logprobs: Array  # (T,) float32, nats under the distribution sampled from
    topk_tokens: Array  # (T, k) int32, likeliest first
    topk_logprobs: Array  # (T, k) float32
    finish: Literal["stop", "length"] | None  # None: more parts follow


@dataclass(frozen=True, slots=True)
class PromptScores:
    """What a model says of a prompt of N tokens, in nats at temperature 1."""

    logprobs: Array  # (N,) float32, of each token given those before it; 0 for the first
    topk_tokens: Array  # (N - 1, k) int32, of the k likeliest tokens in place of tokens 1..N-1, best first
    topk_logprobs: Array  # (N - 1, k) float32


@dataclass(frozen=True, slots=True)
class AnswerParts:
    """What has arrived since the last message. The prompt's scores come in the first."""

    completions: tuple[CompletionPart, ...]
    prompt: PromptScores | None = None
