"""Environment, imports and processes of an engine: what has to be settled before vLLM is imported."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any, Literal

from rlsys.config import SamplerSection
from rlsys.engine.text_only import register
from rlsys.errors import ClusterError
from rlsys.variables import set_default

Device = Literal["cpu", "cuda"]

VLLM_VERSION = "0.32"  # the private API below was read in this one

# What rlsys.engine replaces or calls that vLLM does not promise, with the parameters that it relies on.
PRIVATE_API = {
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.update_metadata": (
        "mapping lora_index_to_id max_loras vocab_size"
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_linear": (
        "y x lora_a_stacked lora_b_stacked scale output_slices buffer"
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits": (
        "y x lora_a_stacked lora_b_stacked scale buffer"
    ),
    "vllm.platforms.cpu:CpuPlatform.get_punica_wrapper": "",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._get_prompt_logprobs_dict": "hidden_states num_scheduled_tokens",
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:select_unquantized_moe_backend": "moe_config",
    "vllm.lora.utils:parse_fine_tuned_lora_name": "name weights_mapper",
    "vllm.model_executor.models.utils:WeightsMapper.get_rename_mapper": "",
    "vllm.lora.lora_model:LoRAModel.from_lora_tensors": (
        "lora_model_id tensors peft_helper device dtype model_vocab_size weights_mapper skip_prefixes"
    ),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.add_adapter": "lora",
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter": "lora_id",
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.remove_adapter": "adapter_id",
    # of the V1 and of the V2 model runner, of which vLLM takes the second on CUDA: the slots hang at its lora_manager
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": "model vllm_config device",
    "vllm.v1.engine.utils:get_mp_context": "",
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor._init_executor": "",
    "vllm.lora.layers.base:BaseLayerWithLoRA.slice_lora_a": "lora_a",
    "vllm.lora.layers.base:BaseLayerWithLoRA.slice_lora_b": "lora_b",
    "vllm.v1.engine.async_llm:AsyncLLM.sleep": "level mode",
    "vllm.v1.engine.async_llm:AsyncLLM.wake_up": "tags",
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": (
        "engine_core_outputs engine_core_timestamp iteration_stats weight_version"
    ),
}
CPU_ONLY = ("vllm.lora.punica_wrapper.punica_cpu", "vllm.platforms.cpu", "vllm.v1.worker.cpu_model_runner")

PRELOAD = ("vllm.v1.engine.async_llm", "vllm.v1.engine.core", "rlsys.engine.cpu", "rlsys.engine.adapters")


def prepare_environment(section: SamplerSection, device: Device = "cpu") -> None:
    """Set what vLLM and torch read once. Call before either is imported; child processes inherit it."""
    os.environ["OMP_NUM_THREADS"] = str(section.threads)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # see rlsys.sampler: one position is allotted and never computed
    set_default("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at length of every choice made here
    if device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # auto pins every engine to core 0
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # allows the worker inside the engine's process
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled: no compiler needed, no 11 s first call
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and it would win over the section
    else:
        # vLLM chooses the V2 model runner here, which the CPU has not. What rlsys.engine touches is in both, read in
        # their sources; neither was run on a GPU yet, so VLLM_USE_V2_MODEL_RUNNER stays the user's to set.
        # CUDA does not outlive a fork. vLLM spawns by itself where it sees that it must, as in a Ray actor. Outside of
        # one an engine's start was seen to end in "Cannot re-initialize CUDA in forked subprocess"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def preload(device: Device = "cpu") -> None:
    """Import vLLM here and, on CPU, in the process from which the engine is forked, at the same time."""
    if device == "cpu":
        multiprocessing.set_forkserver_preload(list(PRELOAD))
        forkserver.ensure_running()
    importlib.import_module("vllm.v1.engine.async_llm")
    check_private_api(device)
    register()


def check_private_api(device: Device = "cpu") -> None:
    """
    Raises:
        ClusterError: another vLLM than the one whose private API rlsys.engine touches.
    """
    import vllm

    if not vllm.__version__.startswith(VLLM_VERSION):
        raise ClusterError(f"vLLM: found version {vllm.__version__}; wanted {VLLM_VERSION}.*, see requirements/")
    for path, wanted in PRIVATE_API.items():
        module, _, name = path.partition(":")
        if device != "cpu" and module in CPU_ONLY:
            continue
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part, None)
        if target is None:
            raise ClusterError(f"vLLM {vllm.__version__}: {path} is gone, which rlsys.engine builds on")
        found = [
            parameter.name
            for parameter in inspect.signature(target).parameters.values()
            if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD
        ]
        if found != wanted.split():
            raise ClusterError(f"vLLM {vllm.__version__}: {path} takes {found}; rlsys.engine wants {wanted.split()}")


@contextmanager
def engine_processes(device: Device) -> Iterator[None]:
    """While inside, vLLM starts its engine by a fork of the preloaded server instead of a fresh interpreter.

    vLLM insists on `spawn` in a Ray actor and on CPU, and pays its import again; the server has it imported. Not on
    CUDA, where a fork server was never tried.
    """
    if device != "cpu":
        yield
        return
    import vllm.v1.engine.utils as utils

    stock = utils.get_mp_context
    utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")
    try:
        yield
    finally:
        utils.get_mp_context = stock
