"""Loads weights that are rounded to model.dtype into an engine that computes in a wider one.

Samplers on a CPU without kernels for bfloat16 compute in float32, as the learner does
(rlsys/architectures/precision.py). Both then have the same base only if the engine's float32 weights are those of the
narrower dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig


class _RoundedWeights(DefaultModelLoader):
    """vLLM's loader of files of any format, with values of `to`."""

    to: torch.dtype

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in super().get_all_weights(model_config, model):
            yield name, weight.to(self.to) if weight.is_floating_point() else weight


@register_model_loader("rlsys-bfloat16")
class BFloat16Weights(_RoundedWeights):
    to = torch.bfloat16


@register_model_loader("rlsys-float16")
class Float16Weights(_RoundedWeights):
    to = torch.float16
