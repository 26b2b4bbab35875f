"""vLLM's CPU worker with what it lacks: fast LoRA, prompt log-probabilities under LoRA, and an end with its parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_worker import CPUWorker

from rlsys.engine.punica import SegmentedPunica

SEGMENTED_PUNICA = f"{SegmentedPunica.__module__}.{SegmentedPunica.__qualname__}"


class CpuWorker(CPUWorker):
    """LoRA by blocks, and prompt log-probabilities that know their adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _die_with_parent()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        CpuPlatform.get_punica_wrapper = classmethod(lambda cls: SEGMENTED_PUNICA)
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if runner.lora_config is None:
            return
        (punica,) = runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
        stock = runner._get_prompt_logprobs_dict

        def with_adapters(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with punica.prompt_logits(hidden_states):
                return stock(hidden_states, *args, **kwargs)

        runner._get_prompt_logprobs_dict = with_adapters


def _die_with_parent() -> None:
    """An engine whose actor was killed must not linger: it holds memory and cores that the next one needs."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="rlsys-parent-watch", daemon=True).start()
