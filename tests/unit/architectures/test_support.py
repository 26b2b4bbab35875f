"""What cannot be trained or served is refused from config.json alone, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from actors.doctor import model as doctors_look
from actors.job import train
from rlsys.architectures.families import FAMILIES
from rlsys.architectures.model_shape import model_shape
from rlsys.architectures.support import refuse_structure, refuse_unsupported, structure_problem
from rlsys.client import ServiceClient
from rlsys.config import JobConfig, LoraSection, SamplerSection, parse_config
from rlsys.errors import ConfigError
from rlsys.planning.fit import Node
from rlsys.planning.plan import plan
from rlsys.tracking.progress import Progress
from tests.families.tiny_models import COMMON
from tests.families.tiny_models import FAMILIES as TINY

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **COMMON}

CANNOT = {
    # model_type -> what is said of it
    "mamba": "state space",
    "falcon_mamba": "state space",
    "jamba": "state space",
    "bamba": "state space",
    "zamba": "other than attention",
    "zamba2": "other than attention",
    "nemotron_h": "other than attention",
    "granitemoehybrid": "other than attention",
    "recurrent_gemma": "other than attention",
    "rwkv": "recurrent",
    "qwen3_next": "linear",
    "minimax": "other than attention",
    "deepseek_v2": "latent attention",
    "deepseek_v3": "latent attention",
    "llama4_text": "chunked_attention",
    "t5": "an encoder-decoder model",
    "bart": "an encoder-decoder model",
    "qwen2_5_vl": "multimodal",
}


def written(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def job(folder: Path, *overrides: str) -> JobConfig:
    return parse_config(f"run: {{name: a, dir: {folder}/runs}}\nmodel: {{path: {folder}}}\n", overrides)


@pytest.mark.parametrize(("kind", "said"), CANNOT.items())
def test_a_model_of_another_structure_is_refused_and_says_of_which(kind: str, said: str) -> None:
    found = structure_problem(CONFIG_MAPPING[kind]().to_dict(), "config.json of x")
    assert found is not None and said in found and "decoder-only" in found, found


def test_a_layer_of_another_kind_among_attention_is_refused() -> None:
    """As LFM2 has them."""
    found = structure_problem({**LLAMA, "layer_types": ["full_attention", "conv"]}, "config.json of x")
    assert found is not None and "layers other than attention (conv)" in found


def test_a_model_with_another_head_is_refused() -> None:
    found = structure_problem({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "config.json of x")
    assert found is not None and "LlamaForSequenceClassification is not a causal language model" in found


def test_a_hybrid_family_without_its_other_layers_is_not() -> None:
    """As the dense ones of Granite 4.0."""
    config = CONFIG_MAPPING["granitemoehybrid"](num_hidden_layers=2, layer_types=["attention"] * 2).to_dict()
    assert structure_problem({**config, "layer_types": ["attention"] * 2}, "config.json of x") is None


@pytest.mark.parametrize("kind", [*FAMILIES, "gemma3", "mistral3", "olmo3", "starcoder2", "seed_oss", "mixtral"])
def test_a_decoder_of_attention_and_mlps_is_not(kind: str) -> None:
    """Those without a row among the families too: the learner proves itself on them."""
    assert structure_problem(CONFIG_MAPPING[kind]().to_dict(), "config.json of x") is None


def test_a_type_that_transformers_does_not_know_is_refused() -> None:
    found = structure_problem({"model_type": "lama", "architectures": ["LamaForCausalLM"]}, "config.json of x")
    assert found is not None and "installed transformers does not know" in found


@pytest.mark.parametrize("tiny", TINY.values(), ids=lambda tiny: tiny.name)
def test_every_family_can_be_trained_and_served(tiny: Any) -> None:
    """Its attention where it is a mixture; a window shorter than the sequences is no hindrance."""
    lora = LoraSection(train_mlp=not FAMILIES[tiny.model_type].experts)
    config = {"model_type": tiny.model_type, **COMMON, **tiny.config}
    refuse_unsupported(config, "x", max_length=2048, lora=lora, sampler=SamplerSection(), device="cpu")


ASKED = [
    # config.json, overrides of the job, what is said
    ({}, ["model.max_length=4096"], ["model.max_length 4096", "2048", "set model.max_length=2048"]),
    ({"head_dim": 40}, [], ["head_dim is 40", "sampler.num_gpus"]),
    ({}, ["sampler.tensor_parallel_size=3"], ["sampler.tensor_parallel_size 3", "set sampler.tensor_parallel_size=2"]),
    (
        {"num_attention_heads": 12, "num_key_value_heads": 4},
        ["sampler.tensor_parallel_size=6"],
        ["4 key-value heads", "set sampler.tensor_parallel_size=4"],
    ),
    ({"vocab_size": 262144}, ["lora.train_unembed=true"], ["lora.train_unembed", "258048"]),
    ({"model_type": "qwen3_moe", "num_experts": 4}, [], ["lora.train_mlp", "Qwen3-MoE", "lora.train_mlp=false"]),
    ({"model_type": "gpt_oss"}, [], ["lora.train_mlp", "gpt-oss", "lora.train_mlp=false"]),
    ({"model_type": "mixtral", "num_local_experts": 8}, [], ["lora.train_mlp", "lora.train_mlp=false"]),
    ({"model_type": "olmo3"}, ["model.max_length=4096"], ["model.max_length 4096", "2048"]),
    ({"model_type": "mamba", "state_size": 16}, [], ["state space"]),
    ({"hidden_size": "wide"}, [], ["hidden_size is 'wide'"]),
]


@pytest.mark.parametrize(("config", "overrides", "said"), ASKED, ids=lambda value: str(value)[:40])
def test_a_job_is_refused_before_ray_starts(
    config: dict[str, Any], overrides: list[str], said: list[str], tmp_path: Path
) -> None:
    folder = written(tmp_path / "model", **{**LLAMA, "architectures": None, **config})
    with pytest.raises(ConfigError) as refused:
        train(job(folder, *overrides), Progress())
    assert all(part in str(refused.value) for part in said), refused.value
    assert not ray.is_initialized() and not (folder / "runs").exists()


@pytest.mark.parametrize(("config", "overrides", "said"), ASKED, ids=lambda value: str(value)[:40])
def test_plan_and_doctor_say_the_same(
    config: dict[str, Any], overrides: list[str], said: list[str], tmp_path: Path
) -> None:
    asked = job(written(tmp_path / "model", **{**LLAMA, "architectures": None, **config}), *overrides)
    check = doctors_look(asked)
    assert check.status == "fail" and all(part in check.found for part in said), check
    try:
        refuse_structure(asked.model.path)
        text = "\n".join(plan(asked, model_shape(asked.model), [Node("here", {"CPU": 8.0}, 2**40)]).shortfalls)
    except ConfigError as error:
        text = str(error)
    if config.get("model_type") not in ("mixtral", "olmo3"):  # of these, a plan has no formula
        assert all(part in text for part in said), text


def test_the_doctor_tells_what_the_model_is(tmp_path: Path) -> None:
    tiny = TINY["gemma2"]
    check = doctors_look(job(written(tmp_path / "model", model_type="gemma2", **COMMON, **tiny.config)))
    assert check.status == "ok" and "Gemma 2: 0.2 M parameters in 3 layers, windows of 64 tokens" in check.found


def test_a_client_is_refused_before_ray_starts(tmp_path: Path) -> None:
    mixture = written(tmp_path / "mixture", model_type="qwen3_moe", **COMMON)
    mamba = written(tmp_path / "mamba", model_type="mamba", state_size=16)
    with ServiceClient(models={"mixture": str(mixture)}) as service:
        with pytest.raises(ConfigError, match=r"lora\.train_mlp: Qwen3-MoE"):
            service.create_lora_training_client("mixture")
        with pytest.raises(ConfigError, match="state space"):
            service.create_sampling_client(base_model=str(mamba))
    assert not ray.is_initialized()
