"""What a config.json says of a model, without its weights, against the model that transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlsys.architectures.families import FAMILIES
from rlsys.architectures.model_shape import ModelShape, of_config
from rlsys.config import LoraSection
from rlsys.errors import ConfigError
from rlsys.planning.memory import adapter_parameters
from tests.families.tiny_models import COMMON
from tests.families.tiny_models import FAMILIES as TINY

# Further forms of a family: what its config.json may switch on or off.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True, "head_dim": None, "num_key_value_heads": None}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}],
    "qwen3": [{"attention_bias": True, "tie_word_embeddings": False}],
    "mistral": [{"sliding_window": None, "tie_word_embeddings": True}],
    "gemma2": [{"layer_types": None, "attention_bias": True, "tie_word_embeddings": False}],
    "gemma3_text": [{"layer_types": None, "num_hidden_layers": 8}],
    "phi3": [{"sliding_window": 64, "num_key_value_heads": None}],
    "smollm3": [{"mlp_bias": True, "tie_word_embeddings": False}],
    "granite": [{"attention_bias": True, "mlp_bias": True}],
    "glm4": [{"attention_bias": False, "tie_word_embeddings": True}],
    "cohere2": [{"layer_types": None, "num_hidden_layers": 8, "attention_bias": True}],
    "exaone4": [
        {"layer_types": None, "num_hidden_layers": 8},
        {"layer_types": ["full_attention"] * 3, "sliding_window": None},
    ],
    "qwen3_moe": [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0], "attention_bias": True}],
    "gpt_oss": [{"layer_types": None, "attention_bias": False, "tie_word_embeddings": True}],
}
CASES = [(tiny.name, tiny.model_type, dict(tiny.config)) for tiny in TINY.values()] + [
    (f"{kind} {' '.join(more)}", kind, {**next(t.config for t in TINY.values() if t.model_type == kind), **more})
    for kind, variants in VARIANTS.items()
    for more in variants
]


def config_of(kind: str, given: Mapping[str, Any]) -> Any:
    return AutoConfig.for_model(kind, **{**COMMON, **given})


def built(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def read(config: Any, folder: Path) -> ModelShape:
    """Through the file that transformers writes."""
    config.save_pretrained(folder)
    return of_config(json.loads((folder / "config.json").read_text()), "config.json")


def parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(("kind", "given"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_family_has_as_many_parameters_as_its_model(kind: str, given: Mapping[str, Any], tmp_path: Path) -> None:
    config = config_of(kind, given)
    model, dims = built(config), read(config, tmp_path)
    assert dims.parameters == parameters(model)
    assert dims.max_positions == config.max_position_embeddings
    layers = model.base_model.layers
    assert dims.layer_parameters == max(parameters(layer) for layer in layers)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * len(layers)
    assert dims.windowed_layers == kinds.count("sliding_attention")
    assert dims.window == (config.sliding_window if dims.windowed_layers else None)


@pytest.mark.parametrize("section", [{}, {"train_mlp": False}, {"train_attn": False}, {"train_unembed": True}], ids=str)
@pytest.mark.parametrize("tiny", TINY.values(), ids=lambda tiny: tiny.name)
def test_an_adapter_has_as_many_parameters_as_peft_gives_it(
    tiny: Any, section: dict[str, bool], tmp_path: Path
) -> None:
    lora = LoraSection(rank=8, **section)
    config = config_of(tiny.model_type, tiny.config)
    dims = read(config, tmp_path)
    targets = [
        *(tiny.attention if lora.train_attn else ()),
        *(tiny.mlp if lora.train_mlp and not dims.mixture_layers else ()),
        *(("lm_head",) if lora.train_unembed else ()),
    ]
    if not targets:  # a mixture whose attention stays as it is
        assert adapter_parameters(lora, dims) == 0
        return
    adapted = get_peft_model(built(config), LoraConfig(r=lora.rank, target_modules=targets))
    trained = sum(weight.numel() for name, weight in adapted.named_parameters() if "lora_" in name)
    assert adapter_parameters(lora, dims) == trained


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(kind: str) -> None:
    """A config.json of nothing but its type: every number comes from the row of the family."""
    config = CONFIG_MAPPING[kind]()
    dims = of_config({"model_type": kind}, "config.json")
    assert dims.parameters == parameters(built(config))
    assert dims.max_positions == config.max_position_embeddings
    assert FAMILIES[kind].architecture == type(built(config)).__name__


@pytest.mark.parametrize("key", ["vocab_size", "num_key_value_heads", "head_dim", "tie_word_embeddings"])
@pytest.mark.parametrize("tiny", TINY.values(), ids=lambda tiny: tiny.name)
def test_a_key_that_is_left_out_takes_the_familys_own_value(tiny: Any, key: str) -> None:
    given = {name: value for name, value in {**COMMON, **tiny.config}.items() if name != key}
    config = CONFIG_MAPPING[tiny.model_type](**given)
    assert of_config({"model_type": tiny.model_type, **given}, "config.json").parameters == parameters(built(config))


def image_and_text(kind: str, text: dict[str, Any], **whole: Any) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = (
        {"image_size": 32, "patch_size": 16, "head_dim": 16}
        if kind == "mistral3"
        else {"image_size": 32, "patch_size": 16}
    )
    return CONFIG_MAPPING[kind](text_config=dict(text), vision_config={**vision, **sizes}, **whole)


@pytest.mark.parametrize(("kind", "name"), [("gemma3", "gemma3"), ("mistral3", "mistral")])
@pytest.mark.parametrize("tied", [True, False])
def test_of_a_checkpoint_of_text_and_images_the_text_part_is_counted(
    kind: str, name: str, tied: bool, tmp_path: Path
) -> None:
    text = {**COMMON, **TINY[name].config, "model_type": TINY[name].model_type}
    config = image_and_text(kind, text, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    head = 0 if tied else model.lm_head.weight.numel()
    dims = read(config, tmp_path)
    assert dims.parameters == parameters(model.model.language_model) + head
    assert "text part" in dims.source
    assert dims.windowed_layers == text.get("layer_types", ["sliding_attention"] * 3).count("sliding_attention")


def test_the_text_part_of_gemma_3_may_leave_out_most_of_its_numbers() -> None:
    """As google/gemma-3-4b-it does: vocabulary, heads and positions are those of the family."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    dims = of_config({"model_type": "gemma3", "text_config": text}, "config.json")
    assert (dims.vocab_size, dims.num_heads, dims.num_kv_heads, dims.head_dim) == (262208, 8, 4, 256)
    assert (dims.window, dims.windowed_layers, dims.max_positions) == (1024, 29, 131072)


def test_a_number_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size is 'wide'; wanted an integer"):
        of_config({"model_type": "llama", "hidden_size": "wide"}, "config.json")
