"""Return types of client calls in addition to `rlsys.types`; names and fields follow the Tinker SDK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.types import SampledSequence, SampleResponse

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "custom")


@dataclass(frozen=True, slots=True)
class SaveWeightsResponse:
    path: str


@dataclass(frozen=True, slots=True)
class SaveWeightsForSamplerResponse:
    path: str


@dataclass(frozen=True, slots=True)
class LoadWeightsResponse:
    path: str


@dataclass(frozen=True, slots=True)
class ModelData:
    arch: str
    model_name: str
    tokenizer_id: str


@dataclass(frozen=True, slots=True)
class GetInfoResponse:
    """Model and adapter of a training client. ``lora_alpha`` is an addition to the Tinker API."""

    model_data: ModelData
    model_id: str
    model_name: str
    lora_rank: int
    lora_alpha: float
    is_lora: bool = True


@dataclass(frozen=True, slots=True)
class SupportedModel:
    """A model of the service. ``running``: a deployment exists; otherwise the first request starts one."""

    model_name: str
    running: bool
    max_context_length: int | None = None  # tokens; known once it runs


@dataclass(frozen=True, slots=True)
class ServerCapabilities:
    """Models and losses of the service."""

    supported_models: Sequence[SupportedModel]
    losses: Sequence[str]


@dataclass(frozen=True, slots=True)
class ShapedSequence(SampledSequence):
    """A completion with the sampling parameters that shaped its distribution.

    Training computes p at temperature 1 over the full vocabulary. If ``on_policy`` is False, ``logprobs`` belong to
    another distribution, and the ratio p / q is not 1 before the first step.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1

    @property
    def on_policy(self) -> bool:
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == -1


@dataclass(frozen=True, slots=True)
class ScoredResponse(SampleResponse):
    """Completions with their sampling parameters, and prompt scores.

    ``topk_prompt_logprobs[i]``: (token id, nats) pairs, most likely first; None for the first token.
    """

    sequences: list[ShapedSequence]
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
