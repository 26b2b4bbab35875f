"""GPU memory in a plan: shortfalls and warnings. All figures are predictions that were never measured on CUDA."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rlsys.architectures.model_shape import ModelShape
from rlsys.config import JobConfig
from rlsys.planning.memory import (
    RoleMemory,
    engine_asleep,
    gib,
    kv_bytes_per_token,
    learner_between_calls,
    sampled_at_once,
    sampler_memory,
)

LEAST_HELD = 0.15  # share of the concurrent sequences, all of model.max_length, that the KV cache should hold


def gpu_shortfalls(
    config: JobConfig, dims: ModelShape, learner: RoleMemory, sampler: RoleMemory, total: int | None
) -> Iterator[str]:
    """Shortfalls on a GPU of `total` bytes: of each role within its share of the GPU, and of a learner and a sampler
    that share the GPU (sampler.colocate) together. None if the GPU's memory is not known."""
    if total is None:
        return
    learner_on_gpu, sampler_on_gpu = config.learner.device == "cuda", config.sampler_device == "cuda"
    part = min(1.0, config.learner.num_gpus)
    if learner_on_gpu and torch_bytes(learner) > part * total:
        yield (
            f"{_UNMEASURED}: a learner needs {gib(torch_bytes(learner))}, and learner.num_gpus "
            f"{config.learner.num_gpus:g} allows {gib(int(part * total))} of {gib(total)}; {_less_for(config)}"
        )
    share = int(config.sampler.gpu_memory_utilization * total)
    if sampler_on_gpu:
        needed = sampler.peak.total + (config.model.max_length + 1) * kv_bytes_per_token(config.model, dims, "cuda")
        if needed > share:
            yield (
                f"{_UNMEASURED}: a sampler needs {gib(needed)} with the KV cache of one sequence of full length, and "
                f"sampler.gpu_memory_utilization allows {gib(share)} of {gib(total)}; raise it, or lower "
                "sampler.max_num_batched_tokens, sampler.max_num_seqs or sampler.max_live_adapters"
            )
    if not (config.sampler.colocate and learner_on_gpu and sampler_on_gpu):
        return
    resting = learner_between_calls(config, dims)
    if resting + share > total:
        fits = math.floor((1 - resting / total) * 100) / 100
        yield (
            f"{_UNMEASURED}: a learner keeps {gib(resting)} between its calls, and sampler.gpu_memory_utilization "
            f"{config.sampler.gpu_memory_utilization:g} takes {gib(share)} of the same {gib(total)}; "
            + (f"set sampler.gpu_memory_utilization={fits:g}" if fits > 0 else "the model is too large for this GPU")
        )
    if learner.peak.total + engine_asleep(config) > total:
        yield (
            f"{_UNMEASURED}: a learner needs {gib(learner.peak.total)}, and a sleeping sampler keeps "
            f"{gib(engine_asleep(config))} of the GPU's {gib(total)}; {_less_for(config)}"
        )


_UNMEASURED = "GPU memory (unmeasured prediction)"


def torch_bytes(learner: RoleMemory) -> int:
    """Peak bytes of a learner without the CUDA context, which torch's memory limit on a shared GPU does not count."""
    peak = learner.peak
    return peak.total - peak.parts.get("CUDA context", 0)


def _less_for(config: JobConfig) -> str:
    """Advice with the keys that lower a learner's memory, the cheapest first."""
    keys = ["a smaller learner.token_budget"]
    if not config.learner.gradient_checkpointing:
        keys.append("learner.gradient_checkpointing=true")
    if config.sampler.colocate or config.learner.num_gpus < 1:
        keys.append("a larger learner.num_gpus")
    if not config.learner.shard_base:
        keys.append("learner.shard_base=true over several ranks")
    return "set " + ", ".join(keys[:-1]) + f" or {keys[-1]}"


def gpu_warnings(config: JobConfig, dims: ModelShape, total: int | None) -> Iterator[str]:
    """Warn if the KV cache on a GPU holds only a small share of the concurrent sequences."""
    if config.sampler_device != "cuda" or total is None:
        return
    cache = int(config.sampler.gpu_memory_utilization * total) - sampler_memory(config, dims).peak.total
    each = (
        config.model.max_length * kv_bytes_per_token(config.model, dims, "cuda") // config.sampler.tensor_parallel_size
    )
    running, held = sampled_at_once(config), cache // each
    if 0 < held < running * LEAST_HELD:
        yield (
            f"sampler.gpu_memory_utilization {config.sampler.gpu_memory_utilization:g} leaves {gib(cache)} for the KV "
            f"cache, enough for {held} sequences of model.max_length {config.model.max_length} of {running} concurrent "
            "ones: vLLM will preempt and recompute long sequences; raise it, or lower sampler.max_num_seqs"
        )
