"""What calls return beside the nouns of `rlsys.types`; names and fields after the Tinker SDK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.types import SampledSequence, SampleResponse

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "custom")


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
    """``lora_alpha`` is ours: the Tinker API has none."""

    model_data: ModelData
    model_id: str
    model_name: str
    lora_rank: int
    lora_alpha: float
    is_lora: bool = True


@dataclass(frozen=True, slots=True)
class SupportedModel:
    """``running``: a deployment answers at once; else asking for the model starts one."""

    model_name: str
    running: bool
    max_context_length: int | None = None  # tokens; known once it runs


@dataclass(frozen=True, slots=True)
class ServerCapabilities:
    supported_models: Sequence[SupportedModel]
    losses: Sequence[str]


@dataclass(frozen=True, slots=True)
class ShapedSequence(SampledSequence):
    """A completion with the shaping it was drawn under.

    A datum carries no temperature: training computes p at temperature 1 over the whole vocabulary. Where ``on_policy``
    is False, ``logprobs`` are of another distribution than that, and the ratio p / q is not 1 before the first step.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1

    @property
    def on_policy(self) -> bool:
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == -1


@dataclass(frozen=True, slots=True)
class ScoredResponse(SampleResponse):
    """``topk_prompt_logprobs[i]``: (token id, nats), the likeliest first; None where nothing predicts the token."""

    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
