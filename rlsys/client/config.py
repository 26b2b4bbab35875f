"""Configuration of the deployments that a `ServiceClient` starts. Sections are the same as in a job's YAML."""

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
from rlsys.config.key_types import Name, PathText, Seconds
from rlsys.utils.shell_paths import expand


def _whole_models(value: object) -> object:
    return {} if value is None else value


class ServiceConfig(Section):
    """Configuration of a deployment: one base model with a learner, shared by all training clients, and samplers."""

    cluster: ClusterSection = ClusterSection()
    models: Annotated[dict[str, PathText], BeforeValidator(_whole_models)] = Field(
        default_factory=dict
    )  # name -> folder
    detached: Name | None = None  # a name: deployments keep running until `rlsys stop`; None: they end with the client
    # dtype of the frozen base in learner and samplers; None: bfloat16 if samplers run on CUDA, float32 on a CPU
    dtype: Precision | None = None
    max_length: int = Field(2048, ge=8, lt=2**24)  # tokens of prompt + completion; limited by the model's positions
    lora_alpha: float = Field(32.0, gt=0)  # the Tinker API has no alpha; its documents imply this value
    learner: LearnerSection | None = None  # None: chosen by the cluster's devices
    sampler: SamplerSection | None = None
    checkpoints: PathText = "checkpoints"  # folder on the learner's node for saved states
    start_timeout_s: Seconds = 900.0
    room_timeout_s: Seconds = 120.0  # limit for a request that waits for a free adapter slot of the engine
    gap_timeout_s: Seconds = 600.0  # limit for a call that waits for an earlier call that has not arrived
    rank_timeout_s: Seconds = 300.0  # limit for a learner rank that waits for another; then all ranks end

    @model_validator(mode="after")
    def _placed_by_ray(self) -> ServiceConfig:
        for name, section in (("learner", self.learner), ("sampler", self.sampler)):
            if section is not None and section.placement.startswith("STRICT"):
                raise ValueError(
                    f"{name}.placement: found {section.placement}; wanted PACK or SPREAD: a deployment makes no "
                    "placement groups, which only a job can wait for"
                )
        if self.learner is not None and self.learner.shard_base and self.learner.num_workers == 1:
            raise ValueError("learner.shard_base shards the base over ranks; set learner.num_workers to 2 or more")
        return self

    @field_validator("sampler")
    @classmethod
    def _awake(cls, section: SamplerSection | None) -> SamplerSection | None:
        if section is not None and section.colocate:
            raise ValueError(
                "sampler.colocate: learner and samplers of a deployment work at the same time, so they cannot use a "
                "GPU in turn; set sampler.colocate=false, and a share of the GPU for each (learner.num_gpus, "
                "sampler.num_gpus)"
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
        """Folder or hub name of a base model: looked up in `models`, or else `base_model` itself.

        Raises:
            ConfigError: the path contains a variable or a user that does not exist.
        """
        return self.models[base_model] if base_model in self.models else expand(base_model)

    def dtype_for(self, sampler: SamplerSection) -> Precision:
        """Dtype of the base in a deployment with these samplers.

        Raises:
            ValueError: the samplers cannot serve adapters in the configured dtype.
        """
        dtype = self.dtype or (HALF_ON_CUDA if sampler.device == "cuda" else "float32")
        refuse_dtype(dtype, sampler, "dtype")
        return dtype


class HostSpec(Section):
    """Constructor argument of a deployment's learner actor."""

    base_model: str
    model: ModelSection
    learner: LearnerSection
    max_lora_rank: int
    lora_alpha: float
    serves_unembed: bool
    checkpoints: str
    detached: str | None
    rank_timeout_s: float = 300.0


class SamplerSpec(Section):
    """Constructor argument of a deployment's sampler actors."""

    model: ModelSection
    section: SamplerSection
    device: Literal["cpu", "cuda"]
    max_canary_diff: float | None  # nats; None: a bound from the numerical noise of learner and engine
    room_timeout_s: float


class DeploymentSpec(Section):
    """What a deployment's actors are started with, also in the place of dead ones."""

    key: str  # of the base, in the names of the actors
    host: HostSpec
    engine: SamplerSpec
    gap_timeout_s: float
    start_timeout_s: float
    max_restarts: int  # of one actor within a while
