"""vLLM's CPU worker with what it lacks: fast LoRA, prompt log-probabilities under LoRA, and an end with its parent."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_worker import CPUWorker

from rlsys.planning.memory import ENGINE_MMAP_THRESHOLD, bound_growth
from rlsys.sampler.vllm import rounded_weights  # noqa: F401  # registers its loaders
from rlsys.sampler.vllm.batch_invariance import batch_invariant_matmul
from rlsys.sampler.vllm.cpu_lora import SegmentedPunica
from rlsys.sampler.vllm.parent_process import die_with_parent

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.v1.outputs import LogprobsTensors

SEGMENTED_PUNICA = f"{SegmentedPunica.__module__}.{SegmentedPunica.__qualname__}"


class CpuWorker(CPUWorker):
    """LoRA by blocks, and prompt log-probabilities that know their adapter."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        bound_growth(self.model_config.get_hidden_size(), ENGINE_MMAP_THRESHOLD)  # before the weights come
        die_with_parent()

    def init_device(self) -> None:
        super().init_device()
        if self.parallel_config.world_size > 1 and self.rank == 0:
            _unlink_shared_memory()

    def load_model(self, *args: object, **kwargs: object) -> None:
        CpuPlatform.get_punica_wrapper = classmethod(lambda cls: SEGMENTED_PUNICA)
        _give_experts_cpu_kernels()
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        batch_invariant_matmul(runner.model)
        if runner.lora_config is None:
            return
        (punica,) = runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
        stock = runner._get_prompt_logprobs_dict

        def with_adapters(
            hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
        ) -> dict[str, LogprobsTensors | None]:
            with punica.prompt_logits(hidden_states):
                return stock(hidden_states, num_scheduled_tokens)

        runner._get_prompt_logprobs_dict = with_adapters


def _give_experts_cpu_kernels() -> None:
    """Where LoRA is on, vLLM takes Triton kernels for experts, which a CPU has not. No adapter of ours goes to experts,
    so theirs are chosen as if it were off."""
    stock = unquantized_fused_moe_method.select_unquantized_moe_backend

    def as_without_lora(moe_config: FusedMoEConfig) -> tuple[UnquantizedMoeBackend, type[FusedMoEExperts] | None]:
        return stock(replace(moe_config, is_lora_enabled=False))

    unquantized_fused_moe_method.select_unquantized_moe_backend = as_without_lora


def _unlink_shared_memory() -> None:
    """Of the workers, which vLLM never takes away. All have it mapped by now, and it ends with the last of them."""
    for path in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*-cpushm_*"):
        path.unlink()
