"""Whether a model can be trained and served as asked, told from its config.json alone, before anything starts.

    structure_problem   of the model itself: no decoder of attention and MLP layers
    problems            of what is asked of it: lengths, adapters, an engine's workers

A family without a row in rlsys/architectures/families.py is tried: the learner proves at loading that it can be packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rlsys.architectures.families import FAMILIES, TEXT_PARTS, Family, family_of, text_part
from rlsys.architectures.model_shape import ModelShape, model_shape, of_config, read_config
from rlsys.config import JobConfig, LoraSection, SamplerSection
from rlsys.errors import ConfigError

# Of vLLM 0.32: head sizes that its attention on CPU has kernels for (v1/attention/backends/cpu_attn.py), and the
# largest vocabulary of an output layer with adapters (lora/layers/logits_processor.py).
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


def local_config(model_path: str) -> tuple[Mapping[str, Any], str] | None:
    """(config.json, where it lies) of a folder here or of the hub's cache; None where only the hub could tell.

    Raises:
        ConfigError: the folder's config.json cannot be read.
    """
    if Path(model_path).is_dir():
        return read_config(Path(model_path)), str(Path(model_path) / "config.json")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model_path, "config.json")
    except HFValidationError:  # no name of the hub's
        return None
    return (read_config(Path(found).parent), found) if isinstance(found, str) else None


def refuse_unsupported_job(job: JobConfig) -> None:
    """For a model that is made, or whose config.json is on this machine; of another, the learner's node finds out.

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
    found = local_config(job.model.path)
    if found is not None:
        refuse_unsupported(
            *found,
            max_length=job.model.max_length,
            lora=job.lora,
            sampler=job.sampler,
            device=job.sampler_device,
        )


def refuse_structure(model_path: str | None) -> None:
    """For a model whose config.json is on this machine.

    Raises:
        ConfigError: it is no decoder of attention and MLP layers.
    """
    found = None if model_path is None else local_config(model_path)
    reason = None if found is None else structure_problem(*found)
    if reason is not None:
        raise ConfigError(reason)


def refuse_unsupported(
    config: Mapping[str, Any],
    source: str,
    *,
    max_length: int,
    lora: LoraSection | None,
    sampler: SamplerSection,
    device: Literal["cpu", "cuda"],
) -> None:
    """
    Raises:
        ConfigError: every reason why this model cannot be trained or served so, one a line.
    """
    structure = structure_problem(config, source)
    found = [structure] if structure else list(problems(config, source, max_length, lora, sampler, device))
    if found:
        raise ConfigError("\n".join(found))


def structure_problem(config: Mapping[str, Any], source: str) -> str | None:
    """Why no model of this config.json can be trained here; None where nothing speaks against it."""
    text = text_part(config)
    kind, name = text.get("model_type"), _name(config)
    reason = None
    if not isinstance(config.get("model_type"), str):
        return f"model.path: {source} has no model_type; wanted a config.json as transformers writes it"
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        reason = "an encoder with a decoder"
    elif text.get("kv_lora_rank"):
        reason = "a model with multi-head latent attention (kv_lora_rank)"
    elif other := _other_layers(text):
        reason = f"a model with layers of another kind ({other})"
    elif not _lists_layers(text) and (key := _found(text, RECURRENT)):
        reason = f"a state space or recurrent model ({key})"
    elif not _lists_layers(text) and (key := _found(text, LINEAR_ATTENTION)):
        reason = f"a model with linear attention ({key})"
    elif text.get("use_bidirectional_attention"):
        reason = "a model that sees later tokens (use_bidirectional_attention)"
    elif text is not config and config["model_type"] not in TEXT_PARTS:
        reason = f"a model of several parts; of these, rlsys knows {', '.join(TEXT_PARTS)}"
    elif not any(str(one).endswith(HEADS) for one in config.get("architectures") or HEADS):
        reason = "no causal language model"
    elif kind not in FAMILIES and not _known_to_transformers(str(kind)):
        reason = "of a model_type that the installed transformers does not know"
    if reason is None:
        return None
    families = ", ".join(family.name for family in FAMILIES.values())
    return (
        f"model.path: {source}: {name} is {reason}; wanted a decoder-only language model of attention and MLP layers, "
        f"such as {families}"
    )


def problems(
    config: Mapping[str, Any],
    source: str,
    max_length: int,
    lora: LoraSection | None,
    sampler: SamplerSection,
    device: Literal["cpu", "cuda"],
) -> Iterator[str]:
    """What of a job cannot be done on this model; each with what would be right. `device` is the samplers'."""
    if family_of(config) is not None:
        yield from shape_problems(of_config(config, source), max_length, lora, sampler, device)
        return
    text = text_part(config)
    positions = text.get("max_position_embeddings")
    if isinstance(positions, int) and max_length > positions:
        yield _too_long(max_length, positions)
    if lora is not None and lora.train_mlp and any(isinstance(text.get(key), int) and text[key] > 1 for key in EXPERTS):
        yield _trains_experts(_name(config))


def shape_problems(
    dims: ModelShape,
    max_length: int,
    lora: LoraSection | None,
    sampler: SamplerSection,
    device: Literal["cpu", "cuda"],
) -> Iterator[str]:
    """Those that the dimensions alone tell."""
    if lora is not None and lora.train_mlp and dims.mixture_layers:
        yield _trains_experts(dims.family.name)
    if max_length > dims.max_positions:
        yield _too_long(max_length, dims.max_positions)
    heads, parallel = dims.num_heads, sampler.tensor_parallel_size
    if heads % dims.num_kv_heads:
        yield (
            f"model.make.num_heads {heads} is no multiple of model.make.num_kv_heads {dims.num_kv_heads}; set "
            f"model.make.num_kv_heads={math.gcd(heads, dims.num_kv_heads)}"
        )
    elif _splits(dims, parallel) != parallel:
        yield (
            f"sampler.tensor_parallel_size {parallel} does not divide the model's {heads} heads and its "
            f"{dims.num_kv_heads} heads of keys; set sampler.tensor_parallel_size={_splits(dims, parallel)}"
        )
    if device == "cpu" and dims.head_dim not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        key = "model.make.head_dim" if dims.source.startswith("model.make") else "model.path"
        yield (
            f"{key}: heads of {dims.head_dim} values; vLLM's attention on CPU takes {sizes}: sample this model "
            "on a GPU (sampler.num_gpus)"
        )
    if lora is not None and lora.train_unembed:
        reason = unembedding_problem(dims.vocab_size, dims.family, device)
        if reason is not None:
            yield f"lora.train_unembed: {reason}; set lora.train_unembed=false"


def unembedding_problem(vocab_size: int, family: Family | None, device: Literal["cpu", "cuda"]) -> str | None:
    """Why an engine cannot have adapters of the output layer; None where it can."""
    if device != "cpu":
        return "vLLM's LoRA on CUDA has no mapping for the rows of prompt log-probabilities there and scores them wrong"
    if family is not None and not family.output_layer:
        return f"vLLM's model of {family.name} has no output layer of its own that an adapter could go to"
    if vocab_size > LARGEST_ADAPTED_VOCABULARY:
        return (
            f"a vocabulary of {vocab_size}; vLLM takes adapters of the output layer up to {LARGEST_ADAPTED_VOCABULARY}"
        )
    return None


def serves_unembedding(config: Mapping[str, Any], device: Literal["cpu", "cuda"]) -> bool:
    """Whether an engine can have adapters of the output layer of a config.json's model."""
    return unembedding_problem(int(text_part(config).get("vocab_size") or 0), family_of(config), device) is None


def _splits(dims: ModelShape, wanted: int) -> int:
    """The largest number of workers up to `wanted` that share queries evenly, and keys evenly or as whole copies."""
    heads, kv = dims.num_heads, dims.num_kv_heads
    return next(n for n in range(wanted, 0, -1) if heads % n == 0 and (kv % n == 0 or n % kv == 0))


def _trains_experts(name: str) -> str:
    return (
        f"lora.train_mlp: {name} is a mixture of experts, whose weights are no linear modules that an adapter goes to; "
        "set lora.train_mlp=false to train its attention"
    )


def _too_long(max_length: int, positions: int) -> str:
    return (
        f"model.max_length {max_length}: the model has positions for {positions}; set model.max_length={positions} "
        "or less"
    )


def _found(text: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if text.get(key)), None)


def _other_layers(text: Mapping[str, Any]) -> str | None:
    """The first kind of layer that is no attention."""
    return next((str(kind) for kind in _lists_layers(text) if kind not in ATTENTION_LAYERS), None)


def _lists_layers(text: Mapping[str, Any]) -> list[Any]:
    """The kind of each layer, where it is written down."""
    return next((text[key] for key in LAYER_LISTS if isinstance(text.get(key), list) and text[key]), [])


def _name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type")]
    return str(names[0])


def _known_to_transformers(kind: str) -> bool:
    from transformers import CONFIG_MAPPING  # seconds, and torch with it: only where no row of ours answers

    return kind in CONFIG_MAPPING
