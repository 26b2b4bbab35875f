"""What a `ServiceClient` starts where nothing runs yet. Sections are those of a job's YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlsys.config import (
    HALF_ON_CUDA,
    ClusterSection,
    LearnerSection,
    ModelSection,
    Precision,
    SamplerSection,
    Section,
    gpu_shares,
    refuse_dtype,
)
from rlsys.config.key_types import Name, Seconds
from rlsys.utils.shell_paths import PathText, expand


def _whole_models(value: object) -> object:
    return {} if value is None else value


class ServiceConfig(Section):
    """One deployment per base model: a learner that all training clients share, and samplers."""

    cluster: ClusterSection = ClusterSection()
    models: Annotated[dict[str, PathText], BeforeValidator(_whole_models)] = Field(
        default_factory=dict
    )  # name -> folder
    detached: Name | None = None  # a name: what is started lives on until `rlsys stop`
    # of the frozen base, in learner and sampler alike; None: bfloat16 for samplers on CUDA, float32 on the CPU
    dtype: Precision | None = None
    max_length: int = Field(
        2048, ge=8, lt=2**24
    )  # tokens of prompt + completion; less where the model has fewer positions
    lora_alpha: float = Field(32.0, gt=0)  # the Tinker API has no alpha; its documents imply this one
    learner: LearnerSection | None = None  # None: by the devices found
    sampler: SamplerSection | None = None
    checkpoints: PathText = "checkpoints"  # the folder, on the learner's node, under which states are saved
    start_timeout_s: Seconds = 900.0
    room_timeout_s: Seconds = 120.0  # how long a request waits for room in a full engine
    gap_timeout_s: Seconds = 600.0  # how long a call waits for one entered before it that never arrives

    @field_validator("learner")
    @classmethod
    def _one_rank(cls, section: LearnerSection | None) -> LearnerSection | None:
        if section is not None and section.num_workers > 1:
            raise ValueError(
                f"learner.num_workers: found {section.num_workers}; a deployment has one learner rank, several are for "
                "`rlsys train`"
            )
        return section

    @field_validator("sampler")
    @classmethod
    def _awake(cls, section: SamplerSection | None) -> SamplerSection | None:
        if section is not None and section.colocate:
            raise ValueError(
                "sampler.colocate: a deployment's learner and samplers work at the same time, so none sleeps; set "
                "sampler.colocate=false, and a part of the GPU for each (learner.num_gpus, sampler.num_gpus)"
            )
        return section

    @model_validator(mode="after")
    def _served_in_its_dtype(self) -> ServiceConfig:
        if self.dtype is not None and self.sampler is not None:
            refuse_dtype(self.dtype, self.sampler, "dtype")
        if self.learner is not None and self.sampler is not None:
            for problem in gpu_shares.problems(self.learner, self.sampler):
                raise ValueError(problem)
        return self

    def source(self, base_model: str) -> str:
        """The folder or hub name that a name of `models` stands for, or that `base_model` is itself.

        Raises:
            ConfigError: it is a path with a variable or a user that does not exist.
        """
        return self.models[base_model] if base_model in self.models else expand(base_model)

    def dtype_for(self, sampler: SamplerSection) -> Precision:
        """Of a deployment with these samplers.

        Raises:
            ValueError: they cannot serve adapters in the dtype that was asked for.
        """
        dtype = self.dtype or (HALF_ON_CUDA if sampler.device == "cuda" else "float32")
        refuse_dtype(dtype, sampler, "dtype")
        return dtype


class HostSpec(Section):
    """A deployment's learner as its door is told."""

    base_model: str
    model: ModelSection
    learner: LearnerSection
    max_lora_rank: int
    lora_alpha: float
    serves_unembed: bool
    checkpoints: str
    detached: str | None


class SamplerSpec(Section):
    """A deployment's samplers as their doors are told."""

    model: ModelSection
    section: SamplerSection
    device: Literal["cpu", "cuda"]
    max_canary_diff: float | None  # nats; None: from the noise of learner and engine
    room_timeout_s: float
