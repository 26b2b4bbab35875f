"""Table of the supported model families.

One row per ``model_type`` of config.json: the structure of its layers, and the defaults of transformers for keys that a
config.json may leave out. tests/unit/architectures/test_families.py builds a model of each family and compares its
parameter count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, SupportsInt, TypeVar, cast

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Value = TypeVar("Value")
Windows = Literal["none", "all", "optional", "pattern"]
Defaults = Mapping[str, int | None]
Config = Mapping[str, object]  # a config.json; its values are checked where they are used


@dataclass(frozen=True, slots=True)
class Family:
    """Decoder with grouped-query attention and gated MLPs.

    `norms`: weight vectors of hidden_size per layer. `head_norms`: norms of queries and keys, one over all heads
    ("whole") or one shared by the heads ("head"). `biases`: key of config.json -> linear modules that have a bias if
    the key is true; modules in `always_biased` always have one. `windows`: layers with sliding-window attention if
    config.json has no ``layer_types``: "all", all except every `period`-th ("pattern"), or only with
    ``use_sliding_window`` ("optional").
    """

    name: str
    model_type: str
    architecture: str
    defaults: Defaults
    attention: tuple[str, ...] = ATTENTION
    mlp: tuple[str, ...] = MLP
    norms: int = 2
    head_norms: Literal["none", "head", "whole"] = "none"
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    always_biased: tuple[str, ...] = ()
    windows: Windows = "none"
    period: int = 0
    experts: bool = False  # mixture of experts; adapters do not train the experts
    wide_norms: bool = False  # norms that keep an fp32 copy of their input for the backward pass
    expert_biases: bool = False  # biases of the experts' matrices and of the router
    sinks: bool = False  # attention sinks: one learned logit per head
    output_layer: bool = True  # vLLM's model has a separate output layer that accepts an adapter


def _defaults(
    hidden: int, inner: int, layers: int, heads: int, kv: int | None, **more: int | None
) -> dict[str, int | None]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": False,
        **more,
    }


def _gemma(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, positions: int
) -> dict[str, int | None]:
    more = {"head_dim": 256, "vocab_size": vocab, "max_position_embeddings": positions, "sliding_window": 4096}
    return _defaults(hidden, inner, layers, heads, kv, **more) | {"tie_word_embeddings": True}


_ATTENTION_BIAS = {"attention_bias": ATTENTION}
_ATTENTION_AND_MLP_BIAS = {"attention_bias": ATTENTION, "mlp_bias": MLP}
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}

_ROWS = (
    Family(
        "Llama 2 and 3.x, SmolLM2",
        "llama",
        "LlamaForCausalLM",
        _defaults(4096, 11008, 32, 32, None, vocab_size=32000, max_position_embeddings=2048),
        biases=_ATTENTION_AND_MLP_BIAS,
    ),
    Family(
        "Qwen2 and Qwen2.5",
        "qwen2",
        "Qwen2ForCausalLM",
        _defaults(4096, 22016, 32, 32, 32, **_QWEN),
        always_biased=QKV,
        windows="optional",
    ),
    Family(
        "Qwen3",
        "qwen3",
        "Qwen3ForCausalLM",
        _defaults(4096, 22016, 32, 32, 32, head_dim=128, **_QWEN),
        head_norms="head",
        biases=_ATTENTION_BIAS,
        windows="optional",
    ),
    Family(
        "Mistral",
        "mistral",
        "MistralForCausalLM",
        _defaults(
            4096, 14336, 32, 32, 8, vocab_size=32000, max_position_embeddings=131072, sliding_window=4096
        ),
        windows="all",
    ),
    Family(
        "Gemma",
        "gemma",
        "GemmaForCausalLM",
        _gemma(3072, 24576, 28, 16, 16, 256000, 8192),
        biases=_ATTENTION_BIAS,
    ),
    Family(
        "Gemma 2",
        "gemma2",
        "Gemma2ForCausalLM",
        _gemma(2304, 9216, 26, 8, 4, 256000, 8192),
        norms=4,
        biases=_ATTENTION_BIAS,
        windows="pattern",
        period=2,
        output_layer=False,
    ),
    Family(
        "Gemma 3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        _gemma(2304, 9216, 26, 8, 4, 262208, 131072),
        norms=4,
        head_norms="head",
        biases=_ATTENTION_BIAS,
        windows="pattern",
        period=6,
    ),
    Family(
        "Phi-3 and Phi-4",
        "phi3",
        "Phi3ForCausalLM",
        _defaults(
            3072, 8192, 32, 32, None, vocab_size=32064, max_position_embeddings=4096, sliding_window=None
        ),
        attention=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
        windows="all",
    ),
    Family(
        "SmolLM3",
        "smollm3",
        "SmolLM3ForCausalLM",
        _defaults(2048, 11008, 36, 16, 4, vocab_size=128256, max_position_embeddings=32768, sliding_window=None)
        | {"tie_word_embeddings": True},
        biases=_ATTENTION_AND_MLP_BIAS,
        windows="optional",
    ),
    Family(
        "OLMo 2",
        "olmo2",
        "Olmo2ForCausalLM",
        _defaults(4096, 11008, 32, 32, None, vocab_size=50304, max_position_embeddings=2048),
        head_norms="whole",
        biases=_ATTENTION_BIAS,
    ),
    Family(
        "Granite",
        "granite",
        "GraniteForCausalLM",
        _defaults(4096, 11008, 32, 32, None, vocab_size=32000, max_position_embeddings=2048),
        biases=_ATTENTION_AND_MLP_BIAS,
    ),
    Family(
        "GLM-4",
        "glm4",
        "Glm4ForCausalLM",
        _defaults(
            4096, 13696, 40, 32, 2, vocab_size=151552, head_dim=128, max_position_embeddings=131072,
            attention_bias=True,
        ),
        mlp=("gate_up_proj", "down_proj"),
        norms=4,
        biases={"attention_bias": QKV},
    ),
    Family(
        "Cohere 2 (Command R7B)",
        "cohere2",
        "Cohere2ForCausalLM",
        _defaults(
            8192, 22528, 40, 64, None, vocab_size=256000, max_position_embeddings=8192, sliding_window=4096
        )
        | {"tie_word_embeddings": True},
        norms=1,
        wide_norms=True,
        biases=_ATTENTION_BIAS,
        windows="pattern",
        period=4,
        output_layer=False,
    ),
    Family(
        "Exaone 4",
        "exaone4",
        "Exaone4ForCausalLM",
        _defaults(
            4096, 16384, 32, 32, 32, vocab_size=102400, max_position_embeddings=2048, sliding_window=4096
        ),
        head_norms="head",
        windows="pattern",
        period=4,
    ),
    Family(
        "Qwen3-MoE",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _defaults(
            2048, 6144, 24, 32, 4, **_QWEN, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
            decoder_sparse_step=1,
        ),
        head_norms="head",
        biases=_ATTENTION_BIAS,
        windows="optional",
        experts=True,
    ),
    Family(
        "gpt-oss",
        "gpt_oss",
        "GptOssForCausalLM",
        _defaults(
            2880, 2880, 36, 64, 8, vocab_size=201088, head_dim=64, max_position_embeddings=131072,
            attention_bias=True, num_experts=128, num_experts_per_tok=4, sliding_window=128,
        ),
        biases=_ATTENTION_BIAS,
        windows="pattern",
        period=2,
        experts=True,
        expert_biases=True,
        sinks=True,
    ),
)  # fmt: skip
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ROWS}

# model_type of a text-and-image checkpoint -> model_type of its text part, if the text part's section does not name one
TEXT_PARTS: Mapping[str, str] = {"gemma3": "gemma3_text", "mistral3": "mistral"}


def text_part(config: Mapping[str, Value]) -> Mapping[str, Value]:
    """Return the configuration of the language model: `config`, or its ``text_config`` with the keys shared by both."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return config
    kind = inner.get("model_type") or TEXT_PARTS.get(str(config.get("model_type")))
    outer = {key: config[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if key in config}
    return cast("Mapping[str, Value]", {**inner, **outer, "model_type": kind})


def family_of(config: Config) -> Family | None:
    """Return the family of a config.json; None if the table has no row for it."""
    return FAMILIES.get(str(text_part(config).get("model_type")))


def value(family: Family, config: Config, key: str) -> object:
    """Return the value of a key of the text part, or the default of transformers."""
    if key == "num_experts":
        key = next((name for name in ("num_experts", "num_local_experts") if name in config), key)
    return config[key] if key in config else family.defaults.get(key)


def integer(setting: object) -> int:
    """Return a number of a config.json as int(), which raises TypeError or ValueError for what is no number."""
    return int(cast(SupportsInt, setting))


def windowed_layers(family: Family, config: Config) -> Iterator[int]:
    """Yield the indices of layers whose attention is limited to ``sliding_window`` tokens."""
    if family.windows == "none" or value(family, config, "sliding_window") is None:
        return
    kinds = config.get("layer_types")
    enabled = bool(config.get("use_sliding_window", False))
    first = cast(int, value(family, config, "max_window_layers") or 0)
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or family.period
    for i in range(integer(value(family, config, "num_hidden_layers"))):
        if family.windows == "all":
            windowed = True
        elif family.windows == "optional" and not enabled:
            windowed = False
        elif isinstance(kinds, list):
            windowed = kinds[i] == "sliding_attention"
        elif family.windows == "optional":
            windowed = i >= first
        else:
            windowed = isinstance(every, int) and (i + 1) % every != 0
        if windowed:
            yield i


def mixture_layers(family: Family, config: Config) -> Iterator[int]:
    """Yield the indices of layers whose MLP is a mixture of experts."""
    if not family.experts:
        return
    single = cast("list[int]", config.get("mlp_only_layers") or [])
    step = integer(value(family, config, "decoder_sparse_step") or 1)
    for i in range(integer(value(family, config, "num_hidden_layers"))):
        if i not in single and (i + 1) % step == 0:
            yield i


def expert_size_key(family: Family) -> str:
    """Return the key of config.json for the intermediate size of one expert."""
    return "moe_intermediate_size" if "moe_intermediate_size" in family.defaults else "intermediate_size"
