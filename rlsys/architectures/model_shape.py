"""Determines the shape of a model without its weights: from model.make, a folder, the Hub, or a list in rlsys."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from rlsys.architectures.families import (
    FAMILIES,
    Config,
    Family,
    expert_size_key,
    family_of,
    integer,
    mixture_layers,
    text_part,
    value,
    windowed_layers,
)
from rlsys.config import MakeSection, ModelSection, yaml_text
from rlsys.errors import ConfigError, did_you_mean

KEPT = Path(__file__).parent / "models.yaml"
HUB_LIMIT_S = 8.0  # for one small file
SAVED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated MLP, or a mixture of such MLPs."""

    source: str  # origin of the numbers, for messages
    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    tie_embeddings: bool
    biased: frozenset[str] = frozenset()  # linear modules with a bias
    num_experts: int = 0  # per mixture layer
    experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of one expert
    mixture_layers: int = 0  # number of mixture-of-experts layers; other layers have one MLP
    window: int | None = None  # sliding window in tokens
    windowed_layers: int = 0  # number of layers with a sliding window
    saved_bytes: int = 2  # bytes per weight in the model's files

    @property
    def query_size(self) -> int:
        """Size of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Size of all key heads together, and of all value heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """Linear modules of a layer's attention: name -> (inputs, outputs)."""
        hidden, query, kv = self.hidden_size, self.query_size, self.kv_size
        sizes = {"q_proj": query, "k_proj": kv, "v_proj": kv, "qkv_proj": query + 2 * kv}
        return {name: (query, hidden) if name == "o_proj" else (hidden, sizes[name]) for name in self.family.attention}

    @property
    def mlp(self) -> dict[str, tuple[int, int]]:
        """Linear modules of a layer's dense MLP: name -> (inputs, outputs). Expert weights are not linear modules."""
        hidden, inner = self.hidden_size, self.intermediate_size
        sizes = {"gate_proj": inner, "up_proj": inner, "gate_up_proj": 2 * inner}
        return {name: (inner, hidden) if name == "down_proj" else (hidden, sizes[name]) for name in self.family.mlp}

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer without its MLP: attention, norms and sinks."""
        all_heads = self.query_size + self.kv_size
        head_norms = {"none": 0, "head": 2 * self.head_dim, "whole": all_heads}[self.family.head_norms]
        sinks = self.num_heads if self.family.sinks else 0
        return self._with_biases(self.attention) + self.family.norms * self.hidden_size + head_norms + sinks

    @property
    def mixture_parameters(self) -> int:
        """Parameters of the router and the experts of one layer."""
        hidden, inner = self.hidden_size, self.expert_size
        biases = 1 + 2 * inner + hidden if self.family.expert_biases else 0
        return self.num_experts * (hidden + 3 * hidden * inner + biases)

    @property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        mlp = self._with_biases(self.mlp)
        return self.attention_parameters + (max(mlp, self.mixture_parameters) if self.mixture_layers else mlp)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding; the output layer has the same size."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        ends = self.embedding_parameters * (1 if self.tie_embeddings else 2) + self.hidden_size
        mlps = (self.num_layers - self.mixture_layers) * self._with_biases(self.mlp)
        mixtures = self.mixture_layers * self.mixture_parameters
        return ends + self.num_layers * self.attention_parameters + mlps + mixtures

    def _with_biases(self, linears: Mapping[str, tuple[int, int]]) -> int:
        return sum(
            inputs * outputs + (outputs if name in self.biased else 0) for name, (inputs, outputs) in linears.items()
        )


def model_shape(model: ModelSection) -> ModelShape:
    """Return the shape of the base model of a job. May download config.json from the Hub.

    Raises:
        ConfigError: the model's config.json is not available, or its model_type is not in the table of families.
    """
    if model.make is not None:
        return _of_make(model.make, model.max_length, model.dtype)
    assert model.path is not None
    if Path(model.path).is_dir():
        return shape_of_folder(Path(model.path))
    config, problem = _from_hub(model.path)
    if config is not None:
        return of_config(config, f"config.json of {model.path} on the hub")
    return _from_list(model.path, problem)


def of_config(config: Config, source: str) -> ModelShape:
    """Return the shape described by a config.json; for a text-and-image checkpoint, that of its text part.

    Raises:
        ConfigError: the model_type is not in the table of families, or a number is missing or invalid.
    """
    text, family = text_part(config), family_of(config)
    if family is None:
        raise ConfigError(
            f"model.path: {source} has model_type {text.get('model_type')!r}; rlsys plan supports {', '.join(FAMILIES)}"
        )

    def number(key: str) -> int:
        setting = value(family, text, key)
        if isinstance(setting, bool) or not isinstance(setting, int) or setting < 1:
            raise ConfigError(f"model.path: {source}: {key} is {setting!r}; wanted an integer, at least 1")
        return setting

    heads, layers = number("num_attention_heads"), number("num_hidden_layers")
    biased = [names for key, names in family.biases.items() if value(family, text, key)]
    mixtures = sum(1 for _ in mixture_layers(family, text))
    windowed = sum(1 for _ in windowed_layers(family, text))
    return ModelShape(
        source=source if text is config else f"{source}, its text part",
        family=family,
        vocab_size=number("vocab_size"),
        hidden_size=number("hidden_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if value(family, text, "num_key_value_heads") is None else number("num_key_value_heads"),
        head_dim=number("hidden_size") // heads if value(family, text, "head_dim") is None else number("head_dim"),
        intermediate_size=number("intermediate_size"),
        max_positions=number("max_position_embeddings"),
        tie_embeddings=bool(value(family, text, "tie_word_embeddings")),
        biased=frozenset(family.always_biased).union(*biased),
        num_experts=number("num_experts") if family.experts else 0,
        experts_per_token=number("num_experts_per_tok") if family.experts else 0,
        expert_size=number(expert_size_key(family)) if family.experts else 0,
        mixture_layers=mixtures,
        window=number("sliding_window") if windowed else None,
        windowed_layers=windowed,
        saved_bytes=SAVED_BYTES.get(str(text.get("dtype") or text.get("torch_dtype")), 4),
    )


def read_config(folder: Path) -> Config:
    """Read the config.json of a model's folder.

    Raises:
        ConfigError: the file does not exist or cannot be read.
    """
    path = folder / "config.json"
    try:
        content = yaml_text.read_json(path.read_text(encoding="utf-8"), f"model.path: {path}")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path: {path} cannot be read ({error}); wanted a folder with config.json, tokenizer and safetensors"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"model.path: {path} holds {type(content).__name__}; wanted a JSON object")
    return content


def hidden_size(config: Config) -> int:
    """Return the hidden size in a config.json, also for a model_type that is not in the table of families."""
    return integer(_setting(config, "hidden_size"))


def vocab_size(config: Config) -> int:
    """Return the number of embedding rows in a config.json, also for other model types."""
    return integer(_setting(config, "vocab_size"))


def max_positions(config: Config) -> int | None:
    """Return the number of positions in a config.json, also for other model types; None if there is no limit."""
    positions = _setting(config, "max_position_embeddings")
    return None if positions is None else integer(positions)


def _setting(config: Config, key: str) -> object:
    family, text = family_of(config), text_part(config)
    return text.get(key) if family is None else value(family, text, key)


def known_models() -> dict[str, ModelShape]:
    """Return the shapes listed in models.yaml, by name on the Hub."""
    listed: dict[str, Config] = yaml.safe_load(KEPT.read_text(encoding="utf-8"))
    return {name: of_config(config, f"config.json of {name}") for name, config in listed.items()}


def _of_make(make: MakeSection, max_length: int, dtype: str) -> ModelShape:
    return ModelShape(
        source="model.make; the vocabulary is an upper bound, the tokenizer may have fewer tokens",
        family=FAMILIES["qwen3"],
        vocab_size=make.vocab_size,
        hidden_size=make.hidden_size,
        num_layers=make.num_layers,
        num_heads=make.num_heads,
        num_kv_heads=make.num_kv_heads,
        head_dim=make.head_dim,
        intermediate_size=make.intermediate_size,
        max_positions=max_length,
        tie_embeddings=True,  # as rlsys.modeling.base_model makes it
        saved_bytes=SAVED_BYTES[dtype],
    )


def shape_of_folder(folder: Path) -> ModelShape:
    """Return the shape of the model in a folder. Raises as `read_config` and `of_config`."""
    return of_config(read_config(folder), str(folder / "config.json"))


def _from_hub(name: str) -> tuple[Config | None, str]:
    """Return (config.json, "") or (None, why not) from the cache or the Hub, after at most HUB_LIMIT_S."""
    configs: list[Config] = []
    problem = [f"no response within {HUB_LIMIT_S:.0f} s"]

    def ask() -> None:
        try:
            configs.append(json.loads(_cached(name) or _downloaded(name)))
        except Exception as error:  # the HTTP libraries raise many types; the message to the user includes the text
            problem[0] = str(error).splitlines()[0] if str(error) else type(error).__name__

    request = threading.Thread(target=ask, daemon=True)  # a DNS lookup may block longer than any HTTP timeout
    request.start()
    request.join(HUB_LIMIT_S)
    return (configs[0], "") if configs else (None, problem[0])


def _cached(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json")
    return Path(path).read_text(encoding="utf-8") if isinstance(path, str) else None


def _downloaded(name: str) -> str:
    """Download config.json with a single attempt: hf_hub_download makes five, about half a minute in total."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]  # documented, not listed

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    url, headers = hf_hub_url(name, "config.json"), build_hf_headers()
    response = get_session().get(url, headers=headers, timeout=HUB_LIMIT_S, follow_redirects=True)
    response.raise_for_status()
    return str(response.text)


def _from_list(name: str, problem: str) -> ModelShape:
    known = known_models()
    if name not in known:
        near = did_you_mean(name, known) or f"; known without the hub: {', '.join(known)}"
        raise ConfigError(
            f"model.path: {name!r} is not a folder on this machine, its config.json cannot be downloaded from the "
            f"Hugging Face Hub ({problem}), and rlsys has no built-in shape for it{near}"
        )
    source = f"the built-in list of rlsys ({known[name].source}), because the Hub cannot be reached: {problem}"
    return replace(known[name], source=source)
