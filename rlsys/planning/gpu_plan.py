"""What a plan says of GPU memory. Every figure is a prediction that nobody has measured on CUDA."""

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

LEAST_HELD = 0.15  # of the sequences that run at once, were all as long as can be


def gpu_shortfalls(
    config: JobConfig, dims: ModelShape, learner: RoleMemory, sampler: RoleMemory, total: int | None
) -> Iterator[str]:
    """On a GPU of `total` bytes: each role in its part, and the two of a pair that takes turns beside each other."""
    if total is None:
        return
    learner_on_gpu, sampler_on_gpu = config.learner.device == "cuda", config.sampler_device == "cuda"
    part = min(1.0, config.learner.num_gpus)
    if learner_on_gpu and torch_bytes(learner) > part * total:
        yield (
            f"{_UNMEASURED}: one learner needs {gib(torch_bytes(learner))}, learner.num_gpus "
            f"{config.learner.num_gpus:g} gives it {gib(int(part * total))} of {gib(total)}; {_less_for(config)}"
        )
    share = int(config.sampler.gpu_memory_utilization * total)
    if sampler_on_gpu:
        needed = sampler.peak.total + (config.model.max_length + 1) * kv_bytes_per_token(config, dims)
        if needed > share:
            yield (
                f"{_UNMEASURED}: one sampler needs {gib(needed)} with the KV cache of one full sequence, "
                f"sampler.gpu_memory_utilization gives it {gib(share)} of {gib(total)}; raise it, or lower "
                "sampler.max_num_batched_tokens, sampler.max_num_seqs or sampler.max_live_adapters"
            )
    if not (config.sampler.colocate and learner_on_gpu and sampler_on_gpu):
        return
    resting = learner_between_calls(config, dims)
    if resting + share > total:
        fits = math.floor((1 - resting / total) * 100) / 100
        yield (
            f"{_UNMEASURED}: a learner keeps {gib(resting)} between its calls, and sampler.gpu_memory_utilization "
            f"{config.sampler.gpu_memory_utilization:g} asks for {gib(share)} of {gib(total)} beside it; "
            + (f"set sampler.gpu_memory_utilization={fits:g}" if fits > 0 else "the model is too large for this GPU")
        )
    if learner.peak.total + engine_asleep(config) > total:
        yield (
            f"{_UNMEASURED}: one learner needs {gib(learner.peak.total)}, and a sampler that sleeps keeps "
            f"{gib(engine_asleep(config))} of the GPU's {gib(total)}; {_less_for(config)}"
        )


_UNMEASURED = "GPU memory (unmeasured prediction)"


def torch_bytes(learner: RoleMemory) -> int:
    """Without the context, which torch's limit for a learner on a shared GPU does not count."""
    peak = learner.peak
    return peak.total - peak.parts.get("CUDA context", 0)


def _less_for(config: JobConfig) -> str:
    """Keys that lower a learner's memory, those first that cost least."""
    keys = ["a smaller learner.token_budget"]
    if not config.learner.gradient_checkpointing:
        keys.append("learner.gradient_checkpointing=true")
    if config.sampler.colocate or config.learner.num_gpus < 1:
        keys.append("a larger learner.num_gpus")
    if not config.learner.shard_base:
        keys.append("learner.shard_base=true over several ranks")
    return "set " + ", ".join(keys[:-1]) + f" or {keys[-1]}"


def gpu_warnings(config: JobConfig, dims: ModelShape, total: int | None) -> Iterator[str]:
    """Of a KV cache on a GPU that holds few of the sequences that are to run at once."""
    if config.sampler_device != "cuda" or total is None:
        return
    cache = int(config.sampler.gpu_memory_utilization * total) - sampler_memory(config, dims).peak.total
    each = config.model.max_length * kv_bytes_per_token(config, dims) // config.sampler.tensor_parallel_size
    running, held = sampled_at_once(config), cache // each
    if 0 < held < running * LEAST_HELD:
        yield (
            f"sampler.gpu_memory_utilization {config.sampler.gpu_memory_utilization:g} leaves {gib(cache)} for the KV "
            f"cache, {held} sequences of model.max_length {config.model.max_length} of the {running} that run at once: "
            "long ones are computed in parts more than once; raise it, or set a smaller sampler.max_num_seqs"
        )
