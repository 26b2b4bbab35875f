"""Section ``sampler``: the engines that sample."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsys.config.key_types import Core, Cpus, Gpus, Processes, Resources, Strategy
from rlsys.config.model import MAX_LORA_RANK, Precision
from rlsys.config.section import Section


class SamplerSection(Section):
    num_workers: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)  # workers of one engine; on GPUs num_gpus must be equal
    colocate: bool = False  # sampler i shares the GPU of learner rank i and sleeps while the rank learns
    num_cpus: Cpus = 1  # of each
    num_gpus: Gpus = 0
    resources: Resources = Field(default_factory=dict)
    nodes: list[str] = Field(default_factory=list)
    placement: Strategy = "PACK"
    threads: Processes | None = None  # of each engine; None: chosen when a run starts
    cores: list[Core] = Field(default_factory=list)  # processors to pin it to; empty: any. Needs one worker on CPU
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(4096, ge=1)
    max_lora_rank: int = Field(
        16, ge=1, le=MAX_LORA_RANK
    )  # a job's default is its lora.rank; rounded up to a slot width of vLLM
    max_live_adapters: int = Field(3, ge=2)  # 2 double-buffer one run's versions, 1 for the start-up probe
    kv_cache_gb: float = Field(1.0, gt=0)  # CPU; at most: less where max_num_seqs sequences of full length need less
    gpu_memory_utilization: float = Field(0.6, gt=0, le=1)
    enforce_eager: bool = False  # CPU engines are always eager

    @model_validator(mode="after")
    def _a_gpu_for_each_worker_of_an_engine(self) -> SamplerSection:
        parallel, gpus = self.tensor_parallel_size, self.num_gpus
        if gpus > 0 and gpus != parallel and (parallel > 1 or gpus > 1):
            raise ValueError(
                f"sampler.tensor_parallel_size {parallel} needs as many whole GPUs for each sampler; found "
                f"sampler.num_gpus {gpus:g}; set sampler.num_gpus={parallel}"
            )
        return self

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.num_gpus > 0 else "cpu"


def refuse_dtype(dtype: Precision, sampler: SamplerSection, key: str) -> None:
    """
    Raises:
        ValueError: the sampler's device cannot serve adapters in `dtype`, which `key` sets.
    """
    if dtype == "float32" and sampler.device == "cuda":
        raise ValueError(
            f"{key} float32: vLLM's LoRA kernels on CUDA take half precision only (sampler.num_gpus "
            f"{sampler.num_gpus:g}); set {key}=bfloat16, or {key}=float16 on a GPU older than compute capability 8.0, "
            "or sampler.num_gpus=0 for a sampler on the CPU"
        )
