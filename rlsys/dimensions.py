"""The dimensions of a model, without its weights: from what a job makes, a folder, the hub, or a list kept here."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rlsys.config import MakeSection, ModelSection
from rlsys.errors import ConfigError, did_you_mean

KEPT = Path(__file__).parent / "models.yaml"
HUB_LIMIT_S = 8.0  # for one small file
SAVED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ARCHITECTURES = {"qwen2": (False, True), "qwen3": (True, False)}  # model_type -> (qk_norm, qkv_bias)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """A decoder with grouped-query attention and a gated MLP."""

    source: str  # where the numbers come from, in words
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    tie_embeddings: bool
    qk_norm: bool  # RMS norms of queries and keys, per head
    qkv_bias: bool
    saved_bytes: int = 2  # of one weight in the model's files

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear module of a layer."""
        hidden, inner, query, kv = self.hidden_size, self.intermediate_size, self.query_size, self.kv_size
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def layer_parameters(self) -> int:
        matrices = sum(inputs * outputs for inputs, outputs in self.linears.values())
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return matrices + norms + (self.query_size + 2 * self.kv_size if self.qkv_bias else 0)

    @property
    def embedding_parameters(self) -> int:
        """Of the input embedding, or of the output layer: they are of one size."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        ends = self.embedding_parameters * (1 if self.tie_embeddings else 2)
        return ends + self.num_layers * self.layer_parameters + self.hidden_size


def dimensions(model: ModelSection) -> Dimensions:
    """Of the base that a job names or makes. May ask the hub for one small file.

    Raises:
        ConfigError: nobody knows the model, or it is of an architecture without a formula here.
    """
    if model.make is not None:
        return _of_make(model.make, model.max_length, model.dtype)
    assert model.path is not None
    if Path(model.path).is_dir():
        return _of_folder(Path(model.path))
    found, problem = _from_hub(model.path)
    if found is not None:
        return of_config(found, f"config.json of {model.path} on the hub")
    return _kept(model.path, problem)


def of_config(config: Mapping[str, Any], source: str) -> Dimensions:
    """From the content of a config.json.

    Raises:
        ConfigError: an architecture without a formula here, or a number is missing.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"model.path: {source} is of model_type {kind!r}; rlsys plan knows {', '.join(sorted(ARCHITECTURES))}"
        )
    qk_norm, qkv_bias = ARCHITECTURES[kind]
    try:
        heads = int(config["num_attention_heads"])
        return Dimensions(
            source=source,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            intermediate_size=int(config["intermediate_size"]),
            max_positions=int(config["max_position_embeddings"]),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=qk_norm,
            qkv_bias=bool(config.get("attention_bias", qkv_bias)),
            saved_bytes=SAVED_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4),
        )
    except KeyError as error:
        raise ConfigError(f"model.path: {source} has no {error}; wanted a whole config.json") from None


def known_models() -> dict[str, Dimensions]:
    """The list kept here, by hub name."""
    names = [field.name for field in fields(Dimensions)]
    listed: dict[str, dict[str, Any]] = yaml.safe_load(KEPT.read_text(encoding="utf-8"))
    return {name: Dimensions(**{key: entry[key] for key in names if key in entry}) for name, entry in listed.items()}


def _of_make(make: MakeSection, max_length: int, dtype: str) -> Dimensions:
    return Dimensions(
        source="model.make; the vocabulary is an upper bound, the tokenizer may need less",
        vocab_size=make.vocab_size,
        hidden_size=make.hidden_size,
        num_layers=make.num_layers,
        num_heads=make.num_heads,
        num_kv_heads=make.num_kv_heads,
        head_dim=make.head_dim,
        intermediate_size=make.intermediate_size,
        max_positions=max_length,
        tie_embeddings=make.tie_embeddings,
        qk_norm=True,
        qkv_bias=False,
        saved_bytes=SAVED_BYTES[dtype],
    )


def _of_folder(folder: Path) -> Dimensions:
    path = folder / "config.json"
    try:
        return of_config(json.loads(path.read_text(encoding="utf-8")), f"{path}")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"model.path: {path} cannot be read ({error}); wanted config, tokenizer and safetensors in the folder"
        ) from None


def _from_hub(name: str) -> tuple[dict[str, Any] | None, str]:
    """(config.json, "") or (None, why not), within HUB_LIMIT_S whatever the network does."""
    answer: list[dict[str, Any]] = []
    problem = [f"no answer within {HUB_LIMIT_S:.0f} s"]

    def ask() -> None:
        try:
            answer.append(json.loads(_cached(name) or _fetched(name)))
        except Exception as error:  # of the libraries below; the user is told it with what is used instead
            problem[0] = str(error).splitlines()[0] if str(error) else type(error).__name__

    asking = threading.Thread(target=ask, daemon=True)  # a name server may hold its caller longer than any timeout
    asking.start()
    asking.join(HUB_LIMIT_S)
    return (answer[0], "") if answer else (None, problem[0])


def _cached(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).read_text(encoding="utf-8") if isinstance(found, str) else None


def _fetched(name: str) -> str:
    """Asked once: hf_hub_download would try five times, half a minute in all."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]  # documented, not listed

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    url, headers = hf_hub_url(name, "config.json"), build_hf_headers()
    answer = get_session().get(url, headers=headers, timeout=HUB_LIMIT_S, follow_redirects=True)
    answer.raise_for_status()
    return str(answer.text)


def _kept(name: str, problem: str) -> Dimensions:
    known = known_models()
    if name not in known:
        near = did_you_mean(name, known) or f"; known without the hub: {', '.join(known)}"
        raise ConfigError(
            f"model.path: {name!r} is no folder here, the Hugging Face hub does not give its config.json ({problem}), "
            f"and rlsys keeps no dimensions of it{near}"
        )
    found = known[name]
    values = {field.name: getattr(found, field.name) for field in fields(Dimensions)}
    values["source"] = f"the list kept in rlsys ({found.source}), because the hub is out of reach: {problem}"
    return Dimensions(**values)
