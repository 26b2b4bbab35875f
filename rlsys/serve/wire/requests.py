"""Bodies of JSON requests. Defaults are those of the protocol; `rlsys.serve.wire.passes` reads training data."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from rlsys.serve.wire.json_body import Items, WireModel


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("wanted a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
Text = Annotated[str, Field(max_length=1024)]
Number = Annotated[int, Field(ge=0, lt=2**31)]  # of a call, a model or a sampler in its session
Metadata = dict[str, Any]  # Any: the user's JSON, which is given back as it came
Ttl = Annotated[int, Field(gt=0, le=10 * 365 * 24 * 3600)]


class CreateSession(WireModel):
    tags: Items[Text] = Field(default_factory=list, max_length=256)
    user_metadata: Metadata = Field(default_factory=dict)
    sdk_version: Text = ""
    project_id: Text | None = None
    display_name: Text | None = None


class SessionOnly(WireModel):
    session_id: Text


class LoraConfig(WireModel):
    rank: Annotated[int, Field(ge=1, le=2**15)] = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(WireModel):
    type: Text = "adamw"


class CreateModel(WireModel):
    session_id: Text
    model_seq_id: Number
    base_model: Text
    user_metadata: Metadata = Field(default_factory=dict)
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()


class LoadWeights(WireModel):
    """Into the model `model_id` as its call `seq_id`, or into a new model of the session."""

    path: Text
    optimizer: bool = False
    model_id: Text | None = None
    seq_id: Number | None = None
    session_id: Text | None = None
    model_seq_id: Number | None = None
    base_model: Text | None = None
    user_metadata: Metadata = Field(default_factory=dict)


class ModelOnly(WireModel):
    model_id: Text


class AdamBody(WireModel):
    learning_rate: Finite = 1e-4
    beta1: Finite = 0.9
    beta2: Finite = 0.95
    eps: Finite = 1e-12
    weight_decay: Finite = 0.0
    grad_clip_norm: Finite = 0.0


class OptimStep(WireModel):
    model_id: Text
    seq_id: Number
    adam_params: AdamBody = AdamBody()
    optimizer_params: OptimizerConfig = OptimizerConfig()


class SaveWeights(WireModel):
    model_id: Text
    seq_id: Number
    path: Text | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata = Field(default_factory=dict)
    kind: Text = "snapshot"
    sampling_session_seq_id: Number | None = None
    age_encryption_recipients: Items[Text] = Field(default_factory=list)


class CreateSamplingSession(WireModel):
    session_id: Text
    sampling_session_seq_id: Number
    base_model: Text | None = None
    model_path: Text | None = None


class TextChunk(WireModel):
    tokens: Items[int] | None = None
    type: Text = "encoded_text"


class Prompt(WireModel):
    chunks: Items[TextChunk]


class SamplingBody(WireModel):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | Items[str] | Items[int] | None = None
    temperature: Annotated[Finite, Field(ge=0)] = 1.0
    top_k: int = -1
    top_p: Annotated[Finite, Field(gt=0, le=1)] = 1.0

    @field_validator("top_k")
    @classmethod
    def _top_k(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("wanted -1 (all tokens) or at least 1")
        return value


class Asample(WireModel):
    sampling_session_id: Text
    seq_id: Annotated[int, Field(ge=0, lt=2**63)]
    num_samples: Annotated[int, Field(ge=1)] = 1
    prompt: Prompt
    sampling_params: SamplingBody = SamplingBody()
    prompt_logprobs: bool = False
    topk_prompt_logprobs: Annotated[int, Field(ge=0)] = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Any = None  # Any: refused, whatever it is
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=0)] | None = None


class RetrieveFuture(WireModel):
    request_id: Text
    allow_metadata_only: bool = False


class CancelFuture(WireModel):
    request_id: Text


class WeightsInfo(WireModel):
    tinker_path: Text


class SetTtl(WireModel):
    ttl_seconds: Ttl | None = None


class FinishReason(WireModel):
    type: Literal["success", "errored", "interrupted"] = "success"


class FinishSession(WireModel):
    reason: FinishReason = FinishReason()
    detail: Text | None = None


class StatusQuery(WireModel):
    type: Text
    reasons: Items[Text] | None = None


class SearchCursor(WireModel):
    last_created_at: datetime = Field(strict=False)
    last_session_id: Text


class SearchSessions(WireModel):
    session_id: Text | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 50
    cursor: SearchCursor | None = None
    display_name: Text | None = None
    user_metadata: Metadata = Field(default_factory=dict)
    statuses: Items[StatusQuery] | None = None
