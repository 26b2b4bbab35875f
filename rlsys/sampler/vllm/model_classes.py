"""The class of a base's model in vLLM, inspected in this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from rlsys.architectures.model_shape import read_config
from rlsys.sampler.vllm.text_only import ARCHITECTURES


def register_classes(base: Path) -> None:
    """Give vLLM the class itself, which the engine needs anyway. vLLM knows a class by name and would inspect it in a
    fresh interpreter, which imports vLLM again, unless a file of its cache has the result. Not for CUDA: importing a
    class could initialise CUDA before the engine's process starts."""
    from vllm import ModelRegistry

    config = read_config(base)
    text_part = ARCHITECTURES.get(str(config.get("model_type")))
    named = config.get("architectures")
    for architecture in [text_part] if text_part else named if isinstance(named, list) else []:
        model = ModelRegistry.models.get(architecture)
        if hasattr(model, "module_name"):  # known by name
            with suppress(Exception):  # vLLM's own inspection then says what is wrong
                ModelRegistry.register_model(architecture, model.load_model_cls())
