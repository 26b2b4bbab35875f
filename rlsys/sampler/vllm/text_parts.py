"""vLLM's classes of text parts, with the names that weights and adapters have in the complete checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

OF_WHOLE = WeightsMapper(
    orig_to_new_prefix={
        "model.language_model.": "model.",
        "model.vision_tower.": None,
        "model.multi_modal_projector.": None,
        # before transformers 4.52
        "language_model.": "",
        "vision_tower.": None,
        "multi_modal_projector.": None,
    }
)


class Gemma3TextPart(Gemma3ForCausalLM):
    hf_to_vllm_mapper = Gemma3ForCausalLM.hf_to_vllm_mapper | OF_WHOLE

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found: set[str] = super().load_weights(OF_WHOLE.apply(weights))
        return found


class Mistral3TextPart(MistralForCausalLM):
    hf_to_vllm_mapper = MistralForCausalLM.hf_to_vllm_mapper | OF_WHOLE

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found: set[str] = super().load_weights(OF_WHOLE.apply(weights))
        return found
