"""Sections ``model`` and ``lora``: the base, and the adapter that is trained on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsys.config.key_types import PathText
from rlsys.config.section import Section

MAX_LORA_RANK = 512  # that vLLM serves

Precision = Literal["float32", "bfloat16", "float16"]


HALF_ON_CUDA: Precision = "bfloat16"  # its default; GPUs below compute capability 8.0 support float16 only


class SupervisedSection(Section):
    """Trains a base from scratch: all weights, cross_entropy over every token, until the gate is passed."""

    problems: int = Field(20_000, ge=1)  # examples, cycled
    worked_share: float = Field(0.5, ge=0, le=1)  # of answers that show their steps; the others state the result only
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(4e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    first_check_step: int = Field(400, ge=1)
    check_every_steps: int = Field(50, ge=1)
    gate_accuracy: float = Field(0.6, ge=0, le=1)  # greedy, with the worked steps forced, on gate_problems
    gate_problems: int = Field(60, ge=1)
    decay_steps: int = Field(250, ge=1)  # after the gate: linear decay to 4 %, then the stage ends
    max_steps: int = Field(1550, ge=1)  # the run stops if the gate is not passed by then


class MakeSection(Section):
    """Dimensions of a Qwen3-architecture model that is trained from scratch."""

    vocab_size: int = Field(320, ge=128)
    hidden_size: int = Field(96, ge=8)
    num_layers: int = Field(3, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(32, ge=32, multiple_of=32)  # a size that vLLM's CPU attention supports
    intermediate_size: int = Field(288, ge=8)
    supervised: SupervisedSection = SupervisedSection()


class ModelSection(Section):
    path: PathText | None = None  # a Hugging Face folder or hub name; exactly one of path and make
    make: MakeSection | None = None
    # of the frozen base, in learner and sampler; the adapter is fp32 in the learner. The default with samplers on CUDA
    # is bfloat16
    dtype: Precision = "float32"
    max_length: int = Field(128, ge=8, lt=2**24)  # tokens of prompt + completion

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.make is None):
            raise ValueError(
                "give exactly one of model.path (an existing model) and model.make (a model trained from scratch)"
            )
        return self


class LoraSection(Section):
    rank: int = Field(16, ge=1, le=MAX_LORA_RANK)
    alpha: float = Field(32.0, gt=0)
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False
