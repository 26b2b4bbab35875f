"""Chooses the resources of a deployment by the cluster's devices, and refuses a deployment that does not fit."""

from __future__ import annotations

import time
from collections.abc import Mapping

import ray

from rlsys.client.config import ServiceConfig
from rlsys.config import LearnerSection, Precision, SamplerSection, gpu_shares
from rlsys.errors import ClusterError, ConfigError

SETTLE_S = 5.0  # Ray counts an ended actor's resources as free only after a moment
RANK, LIVE = 32, 8  # defaults of samplers: Tinker's default rank, and eight adapter slots


def sections(config: ServiceConfig, has: Mapping[str, float]) -> tuple[LearnerSection, SamplerSection]:
    """Sections of the config; without them one learner and one sampler that share the cluster's CPUs or GPUs.
    `has`: resource name -> amount in the cluster.

    Raises:
        ConfigError: learner and samplers do not fit together on the cluster's GPUs.
    """
    cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    if gpus >= 1:
        share = 1.0 if gpus >= 2 else 0.5
        learner = LearnerSection(num_gpus=share)
        sampler = SamplerSection(
            num_gpus=share,
            gpu_memory_utilization=0.85 if share == 1.0 else 0.45,  # the CUDA contexts of two processes need memory too
            max_lora_rank=RANK,
            max_live_adapters=LIVE,
        )
    else:
        share, threads = (float(int(cpus) // 2) or 0.5), max(1, int(cpus) // 2)
        learner = LearnerSection(num_cpus=share, threads=threads)
        sampler = SamplerSection(num_cpus=share, threads=threads, max_lora_rank=RANK, max_live_adapters=LIVE)
    learner, sampler = config.learner or learner, config.sampler or sampler
    for problem in gpu_shares.problems(learner, sampler):
        raise ConfigError(f"ServiceConfig: {problem}")
    return learner, sampler


def dtype_of(config: ServiceConfig, sampler: SamplerSection) -> Precision:
    """Dtype of the base, the same for learner and samplers.

    Raises:
        ConfigError: the samplers cannot serve adapters in the configured dtype.
    """
    try:
        return config.dtype_for(sampler)
    except ValueError as error:
        raise ConfigError(f"ServiceConfig: {error}") from None


def refuse_shortfall(learner: LearnerSection, sampler: SamplerSection) -> None:
    """Compare with the cluster's free resources, before Ray would queue the actors silently.

    Raises:
        ClusterError: too few resources; the message has the shortfall and the sections that request them.
    """
    total, deadline = ray.cluster_resources(), time.monotonic() + SETTLE_S
    while True:
        free = ray.available_resources()
        short = shortfall(learner, sampler, free)
        if short is None:
            return
        if shortfall(learner, sampler, total) is not None or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    resource, asked, found = short
    raise ClusterError(
        f"a deployment needs {asked:g} {resource}s (learner {_needs(learner, resource):g} + {sampler.num_workers} "
        f"sampler(s) x {_needs(sampler, resource):g}), the cluster has {found:g} free of {total.get(resource, 0.0):g}: "
        f"{asked - found:g} too few. Stop another deployment (`rlsys stop`, ServiceClient.close()), or request less "
        "with ServiceConfig(learner=..., sampler=...): num_cpus and num_gpus may be fractions"
    )


def shortfall(
    learner: LearnerSection, sampler: SamplerSection, has: Mapping[str, float]
) -> tuple[str, float, float] | None:
    """(resource, requested, available) of the first resource that is too small; None if all suffice."""
    for resource in ("CPU", "GPU"):
        asked = _needs(learner, resource) + sampler.num_workers * _needs(sampler, resource)
        found = has.get(resource, 0.0)
        if asked > found + 1e-6:
            return resource, asked, found
    return None


def _needs(section: LearnerSection | SamplerSection, resource: str) -> float:
    return section.num_cpus if resource == "CPU" else section.num_gpus
