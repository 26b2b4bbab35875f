"""Arguments of a vLLM engine."""

from __future__ import annotations

from pathlib import Path

from rlsys.architectures.model_shape import read_config, shape_of_folder
from rlsys.architectures.precision import computing_dtype
from rlsys.architectures.support import serves_unembedding
from rlsys.config import ModelSection, SamplerSection
from rlsys.modeling.module_roles import names, roles_of, skeleton
from rlsys.modeling.text_part import configuration, is_composite
from rlsys.planning.memory import CPU_BLOCK_TOKENS, kv_cache_bytes, slot_width
from rlsys.sampler.engine_start import Device
from rlsys.sampler.vllm.text_only import text_only


def engine_arguments(
    base: Path, model: ModelSection, section: SamplerSection, seed: int, device: Device, has_tokenizer: bool
) -> dict[str, object]:
    """Arguments of vLLM's AsyncEngineArgs; `vllm.LLM` takes the same."""
    cpu, parallel = device == "cpu", section.tensor_parallel_size
    # One position more than promised: vLLM wants to generate a token even where a full-length sequence is only
    # scored. That token is never fed back, so its position is never computed.
    max_model_len = model.max_length + 1
    computing = computing_dtype(model.dtype, device)
    by_device: dict[str, object] = (
        {
            "distributed_executor_backend": "uni"
            if parallel == 1
            else "rlsys.sampler.vllm.cpu_tensor_parallel.CpuExecutor",
            "worker_cls": "rlsys.sampler.vllm.cpu_worker.CpuWorker",
            "block_size": CPU_BLOCK_TOKENS,
            "kv_cache_memory_bytes": kv_cache_bytes(section, model, shape_of_folder(base))
            // parallel,  # of each worker
            # a seeded request whose prefill is cut in two kills the CPU engine ("does not use offset")
            "enable_chunked_prefill": False,
        }
        if cpu
        else {
            "worker_cls": "rlsys.sampler.vllm.cuda_worker.CudaWorker",
            "gpu_memory_utilization": section.gpu_memory_utilization,
            "enable_sleep_mode": section.colocate,
            # by default vLLM would ask Ray for workers in our placement group, where no GPU is free
            **({"distributed_executor_backend": "mp"} if parallel > 1 else {}),
        }
    )
    return {
        "model": str(base),
        "dtype": computing,
        # a loader of rlsys.sampler.vllm.rounded_weights
        **({} if computing == model.dtype else {"load_format": f"rlsys-{model.dtype}"}),
        "seed": numpy_seed(seed),
        "tensor_parallel_size": parallel,
        "max_model_len": max_model_len,
        "max_num_seqs": section.max_num_seqs,
        "max_num_batched_tokens": max(section.max_num_batched_tokens, max_model_len),
        "enforce_eager": cpu or section.enforce_eager,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": not has_tokenizer,
        "generation_config": "vllm",  # else the model's own file would change temperature, top_k and top_p
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "enable_lora": True,
        "max_loras": section.max_live_adapters,
        "max_cpu_loras": section.max_live_adapters,
        "max_lora_rank": slot_width(section),
        "lora_target_modules": target_modules(base, device),
        **({"hf_overrides": text_only} if is_composite(configuration(base)) else {}),
        "worker_extension_cls": "rlsys.sampler.vllm.adapter_worker.AdapterExtension",
        "disable_log_stats": True,
        **by_device,
    }


def numpy_seed(seed: int) -> int:
    """Seed of numpy and torch in an engine. Completions do not depend on it: every request has a seed."""
    return seed % 2**32


def target_modules(base: Path, device: Device) -> list[str]:
    """Last parts of the names of modules that get adapter slots: all that a run may train on this device."""
    roles = roles_of(skeleton(configuration(base).get_text_config(decoder=True)))
    mlp = () if roles.experts else roles.mlp
    unembedding = roles.unembedding if serves_unembedding(read_config(base), device) else ()
    return [*names(roles.attention), *names(mlp), *names(unembedding)]
