"""What rlsys.sampler.vllm replaces or calls that vLLM does not promise, and in which versions that was checked."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from packaging.version import InvalidVersion, Version

from rlsys.errors import ClusterError
from rlsys.sampler.vllm_build import LISTS, SET_UP, Device

PINNED = "0.32"  # the version of requirements/, which the tests run
# Versions of which the functions below were read, and what is known of each. Another version is refused: equal
# parameters do not say that a function still does the same.
CHECKED = {
    "0.32": "runs in the tests on CPU; CUDA's build of it has the same Python sources",
    "0.33": "CUDA's build was read, never run: what changed in its private functions does not concern rlsys",
}

# With the parameters that rlsys.sampler.vllm relies on.
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
    "vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides": "",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._get_prompt_logprobs_dict": "hidden_states num_scheduled_tokens",
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights": "model_config model",
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
    "vllm.logger:configure_logging": "config",
    "vllm.v1.engine.core:configure_logging": "config",
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


def check_private_api(device: Device = "cpu") -> None:
    """
    Raises:
        ClusterError: another vLLM than those whose private API rlsys.sampler.vllm knows.
    """
    import vllm

    found = vllm.__version__
    changes = _changes(device)
    if minor(found) not in CHECKED:
        raise ClusterError(unknown_version(found, device, changes))
    if changes:
        raise ClusterError(
            f"vLLM {found}: {'; '.join(changes)}. rlsys.sampler.vllm builds on vLLM as released; {_pinned(device)}"
        )


def minor(version: str) -> str:
    """ "0.32" of "0.32.1+cu130"; what is no version is returned as it is."""
    try:
        return ".".join(map(str, Version(version).release[:2]))
    except InvalidVersion:
        return version


def unknown_version(found: str, device: Device, changes: list[str]) -> str:
    """How an unchecked version of vLLM differs, and which version to install."""
    compared = (
        f"of the {len(PRIVATE_API)} private functions that rlsys.sampler.vllm builds on, {len(changes)} differ: "
        f"{'; '.join(changes)}"
        if changes
        else f"the {len(PRIVATE_API)} private functions that rlsys.sampler.vllm builds on take the same parameters in "
        f"it, "
        "but nobody has read what they do: adapters could be served wrongly"
    )
    return f"vLLM {found} is installed, and rlsys knows {' and '.join(CHECKED)}; {compared}. {_pinned(device)}"


def _pinned(device: Device) -> str:
    return f"{SET_UP[device]} installs {PINNED}, as {LISTS[device]} pin it"


def _changes(device: Device) -> list[str]:
    """Functions of PRIVATE_API that are gone or take other parameters."""
    changes = []
    for path, wanted in PRIVATE_API.items():
        module, _, name = path.partition(":")
        if device != "cpu" and module in CPU_ONLY:
            continue
        target = _function(module, name)
        if target is None:
            changes.append(f"{path} is gone")
            continue
        found = [
            parameter.name
            for parameter in inspect.signature(target).parameters.values()
            if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD
        ]
        if found != wanted.split():
            changes.append(f"{path} takes {found}, not {wanted.split()}")
    return changes


def _function(module: str, name: str) -> Callable[..., object] | None:
    try:
        target: object = importlib.import_module(module)
    except ImportError:
        return None
    for part in name.split("."):
        target = getattr(target, part, None)
    return target if callable(target) else None
