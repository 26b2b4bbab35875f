"""Chooses the resources of a deployment by the cluster's devices, and refuses a deployment that does not fit."""

from __future__ import annotations

import time
from typing import Any

import ray

from actors.cluster.ray_cluster import threads_env
from rlsys.client.config import ServiceConfig
from rlsys.config import LearnerSection, Precision, SamplerSection, gpu_shares
from rlsys.errors import ClusterError, ConfigError
from rlsys.planning.fit import Resources, Shortage, needs, shortages, sum_resources

SETTLE_S = 5.0  # Ray counts an ended actor's resources as free only after a moment
RANK, LIVE = 32, 8  # defaults of samplers: Tinker's default rank, and eight adapter slots


def sections(config: ServiceConfig, has: Resources) -> tuple[LearnerSection, SamplerSection]:
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
    name = short.resource
    raise ClusterError(
        f"a deployment needs {short.needed:g} {name}s (learner.num_workers {learner.num_workers} x "
        f"{needs(learner, 0).get(name, 0):g} + sampler.num_workers {sampler.num_workers} x "
        f"{needs(sampler, 0).get(name, 0):g}), the cluster has {short.found:g} free of {total.get(name, 0.0):g}: "
        f"{short.missing:g} too few. Stop another deployment (`rlsys stop`, ServiceClient.close()), or request less "
        "with ServiceConfig(learner=..., sampler=...): num_cpus and num_gpus may be fractions"
    )


def shortfall(learner: LearnerSection, sampler: SamplerSection, has: Resources) -> Shortage | None:
    """The first resource that is too small; None if all suffice."""
    ranks = (needs(learner, i) for i in range(learner.num_workers))
    samplers = (needs(sampler, i) for i in range(sampler.num_workers))
    return next(shortages(sum_resources([*ranks, *samplers]), has), None)


def actor_options(section: LearnerSection | SamplerSection, index: int) -> dict[str, Any]:
    """Ray's options of one actor, learner rank or sampler number `index`. Any: `ray.remote` declares none."""
    wanted = needs(section, index)
    others = {name: amount for name, amount in wanted.items() if name not in ("CPU", "GPU")}
    return {
        "num_cpus": section.num_cpus,
        "num_gpus": section.num_gpus,
        "resources": others,
        "runtime_env": threads_env(section.threads),
        "scheduling_strategy": "SPREAD" if section.placement == "SPREAD" else "DEFAULT",
    }
