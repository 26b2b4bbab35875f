"""Checks from config.json alone, before anything starts, whether a job can train and serve a model.

    structure_problem   the model's architecture: it must be a decoder of attention and MLP layers
    problems            the job's settings for it: lengths, adapters, tensor parallelism

A model_type without a row in rlsys/architectures/families.py is not refused: when the learner loads the model, it
verifies that packed sequences give the right result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

from rlsys.architectures.families import FAMILIES, TEXT_PARTS, Config, Family, family_of, integer, text_part
from rlsys.architectures.model_shape import ModelShape, model_shape, of_config, read_config
from rlsys.config import JobConfig, LoraSection, SamplerSection
from rlsys.errors import ConfigError

# Limits of vLLM 0.32: head sizes with a CPU attention kernel (v1/attention/backends/cpu_attn.py), and the largest
# vocabulary of an output layer with adapters (lora/layers/logits_processor.py).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
LARGEST_ADAPTED_VOCABULARY = 258_048

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "_block_types")
RECURRENT = (
    *("state_size", "ssm_cfg", "ssm_state_size", "mamba_d_state", "mamba_expand", "time_step_rank"),
    "attention_hidden_size",  # RWKV
)
LINEAR_ATTENTION = ("linear_num_key_heads", "linear_attn_config", "attn_type_list", "hybrid_override_pattern")
HEADS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def local_config(model_path: str) -> tuple[Config, str] | None:
    """Return (config.json, its path) from a local folder or the Hub's cache; None if only the Hub may have it.

    Raises:
        ConfigError: the folder's config.json cannot be read.
    """
    if Path(model_path).is_dir():
        return read_config(Path(model_path)), str(Path(model_path) / "config.json")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model_path, "config.json")
    except HFValidationError:  # not a valid name on the Hub
        return None
    return (read_config(Path(cached).parent), cached) if isinstance(cached, str) else None


def refuse_unsupported_job(job: JobConfig) -> None:
    """Check a model that the job makes, or whose config.json is on this machine.

    Other models are checked on the learner's node.

    Raises:
        ConfigError: as `refuse_unsupported`.
    """
    if job.model.path is None:
        wrong = list(
            shape_problems(model_shape(job.model), job.model.max_length, job.lora, job.sampler, job.sampler_device)
        )
        if wrong:
            raise ConfigError("\n".join(wrong))
        return
    config_and_path = local_config(job.model.path)
    if config_and_path is not None:
        refuse_unsupported(
            *config_and_path,
            max_length=job.model.max_length,
            lora=job.lora,
            sampler=job.sampler,
            device=job.sampler_device,
        )


def refuse_structure(model_path: str | None) -> None:
    """Check the architecture of a model whose config.json is on this machine.

    Raises:
        ConfigError: the model is not a decoder of attention and MLP layers.
    """
    config_and_path = None if model_path is None else local_config(model_path)
    reason = None if config_and_path is None else structure_problem(*config_and_path)
    if reason is not None:
        raise ConfigError(reason)


def refuse_unsupported(
    config: Config,
    source: str,
    *,
    max_length: int,
    lora: LoraSection | None,
    sampler: SamplerSection,
    device: Literal["cpu", "cuda"],
) -> None:
    """Check that a model can be trained and served with these settings; `source` names its config.json.

    Raises:
        ConfigError: every reason why not, one per line.
    """
    structure = structure_problem(config, source)
    reasons = [structure] if structure else list(problems(config, source, max_length, lora, sampler, device))
    if reasons:
        raise ConfigError("\n".join(reasons))


def structure_problem(config: Config, source: str) -> str | None:
    """Return why a model with this config.json cannot be trained; None if no reason is known."""
    text = text_part(config)
    kind, name = text.get("model_type"), _name(config)
    reason = None
    if not isinstance(config.get("model_type"), str):
        return f"model.path: {source} has no model_type; wanted a config.json in the format of transformers"
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        reason = "an encoder-decoder model"
    elif text.get("kv_lora_rank"):
        reason = "a model with multi-head latent attention (kv_lora_rank)"
    elif other := _other_layers(text):
        reason = f"a model with layers other than attention ({other})"
    elif not _layer_kinds(text) and (key := _first_key(text, RECURRENT)):
        reason = f"a state space or recurrent model ({key})"
    elif not _layer_kinds(text) and (key := _first_key(text, LINEAR_ATTENTION)):
        reason = f"a model with linear attention ({key})"
    elif text.get("use_bidirectional_attention"):
        reason = "a model with bidirectional attention (use_bidirectional_attention)"
    elif text is not config and config["model_type"] not in TEXT_PARTS:
        reason = f"a multimodal model; rlsys supports only {', '.join(TEXT_PARTS)} among these"
    elif not any(name.endswith(HEADS) for name in _architectures(config) or HEADS):
        reason = "not a causal language model"
    elif kind not in FAMILIES and not _known_to_transformers(str(kind)):
        reason = f"a model with a model_type ({kind}) that the installed transformers does not know"
    if reason is None:
        return None
    families = ", ".join(family.name for family in FAMILIES.values())
    return (
        f"model.path: {source}: {name} is {reason}; wanted a decoder-only language model of attention and MLP layers, "
        f"such as {families}"
    )


def problems(
    config: Config,
    source: str,
    max_length: int,
    lora: LoraSection | None,
    sampler: SamplerSection,
    device: Literal["cpu", "cuda"],
) -> Iterator[str]:
    """Yield the settings of a job that this model does not support, each with a fix; `device` is the samplers'."""
    if family_of(config) is not None:
        yield from shape_problems(of_config(config, source), max_length, lora, sampler, device)
        return
    text = text_part(config)
    positions = text.get("max_position_embeddings")
    if isinstance(positions, int) and max_length > positions:
        yield _too_long(max_length, positions)
    if (
        lora is not None
        and lora.train_mlp
        and any(isinstance(count, int) and count > 1 for count in map(text.get, EXPERTS))
    ):
        yield _trains_experts(_name(config))


def shape_problems(
    dims: ModelShape,
    max_length: int,
    lora: LoraSection | None,
    sampler: SamplerSection,
    device: Literal["cpu", "cuda"],
) -> Iterator[str]:
    """Yield the problems that depend only on the model's shape."""
    if lora is not None and lora.train_mlp and dims.mixture_layers:
        yield _trains_experts(dims.family.name)
    if max_length > dims.max_positions:
        yield _too_long(max_length, dims.max_positions)
    heads, parallel = dims.num_heads, sampler.tensor_parallel_size
    if heads % dims.num_kv_heads:
        yield (
            f"model.make.num_heads {heads} is not a multiple of model.make.num_kv_heads {dims.num_kv_heads}; set "
            f"model.make.num_kv_heads={math.gcd(heads, dims.num_kv_heads)}"
        )
    elif _max_parallel(dims, parallel) != parallel:
        yield (
            f"sampler.tensor_parallel_size {parallel} does not divide the model's {heads} attention heads and its "
            f"{dims.num_kv_heads} key-value heads; set sampler.tensor_parallel_size={_max_parallel(dims, parallel)}"
        )
    if device == "cpu" and dims.head_dim not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        key = "model.make.head_dim" if dims.source.startswith("model.make") else "model.path"
        yield (
            f"{key}: head_dim is {dims.head_dim}, but vLLM's CPU attention supports only {sizes}; sample this model on "
            "a GPU (sampler.num_gpus)"
        )
    if lora is not None and lora.train_unembed:
        reason = unembedding_problem(dims.vocab_size, dims.family, device)
        if reason is not None:
            yield f"lora.train_unembed: {reason}; set lora.train_unembed=false"


def unembedding_problem(vocab_size: int, family: Family | None, device: Literal["cpu", "cuda"]) -> str | None:
    """Return why an engine cannot serve adapters of the output layer; None if it can."""
    if device != "cpu":
        return (
            "vLLM's LoRA on CUDA has no mapping for the rows of prompt log-probabilities in the output layer and "
            "computes wrong values for them"
        )
    if family is not None and not family.output_layer:
        return f"vLLM's model of {family.name} has no separate output layer for an adapter"
    if vocab_size > LARGEST_ADAPTED_VOCABULARY:
        return (
            f"the vocabulary has {vocab_size} tokens, but vLLM supports adapters of the output layer only up to "
            f"{LARGEST_ADAPTED_VOCABULARY}"
        )
    return None


def serves_unembedding(config: Config, device: Literal["cpu", "cuda"]) -> bool:
    """Return whether an engine can serve adapters of the output layer of this model."""
    return unembedding_problem(integer(text_part(config).get("vocab_size") or 0), family_of(config), device) is None


def _max_parallel(dims: ModelShape, wanted: int) -> int:
    """Return the largest valid tensor_parallel_size up to `wanted`.

    It divides the attention heads; key-value heads are divided evenly, or each is replicated equally often.
    """
    heads, kv = dims.num_heads, dims.num_kv_heads
    return next(n for n in range(wanted, 0, -1) if heads % n == 0 and (kv % n == 0 or n % kv == 0))


def _trains_experts(name: str) -> str:
    return (
        f"lora.train_mlp: {name} is a mixture of experts, and adapters cannot be attached to expert weights; set "
        "lora.train_mlp=false to train only its attention"
    )


def _too_long(max_length: int, positions: int) -> str:
    return (
        f"model.max_length {max_length}: the model supports only {positions} positions; set "
        f"model.max_length={positions} or less"
    )


def _first_key(text: Config, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if text.get(key)), None)


def _other_layers(text: Config) -> str | None:
    """Return the first layer kind that is not attention; None if there is none."""
    return next((str(kind) for kind in _layer_kinds(text) if kind not in ATTENTION_LAYERS), None)


def _layer_kinds(text: Config) -> list[object]:
    """Return the kind of each layer, if the configuration lists them."""
    return next((kinds for kinds in map(text.get, LAYER_LISTS) if isinstance(kinds, list) and kinds), [])


def _architectures(config: Config) -> list[str]:
    return [str(name) for name in cast("list[object]", config.get("architectures") or [])]


def _name(config: Config) -> str:
    return (_architectures(config) or [str(config.get("model_type"))])[0]


def _known_to_transformers(kind: str) -> bool:
    from transformers import CONFIG_MAPPING  # takes seconds and imports torch: only for model types without a row

    return kind in CONFIG_MAPPING
