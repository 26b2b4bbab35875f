"""Claims about a base model's folder: what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import MakeSection
from rlsys.errors import ConfigError
from rlsys.modeling.base_model import initial_model
from rlsys.utils.packed_folder import pack_folder

MICRO = MakeSection(
    vocab_size=128, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=24
)
TOKENIZER = build_tokenizer(["1+1=2\n"], 128)


def made(path: Path, seed: int = 0, make: MakeSection = MICRO) -> Path:
    initial_model(make, TOKENIZER, 64, seed, path)
    return path


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    one, two, other = (pack_folder(made(tmp_path / str(i), seed)) for i, seed in enumerate([5, 5, 6]))
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]


def test_making_a_model_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    made(tmp_path / "base")
    assert torch.equal(torch.rand(3), wanted)


def test_the_folder_is_a_qwen3_with_end_and_pad_ids_and_its_tokenizer(tmp_path: Path) -> None:
    folder = made(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == len(TOKENIZER)
    assert config["max_position_embeddings"] == 64
    for section in (config, generation):
        assert section["eos_token_id"] == TOKENIZER.eos_token_id
        assert section["pad_token_id"] == TOKENIZER.pad_token_id
    assert AutoTokenizer.from_pretrained(folder).encode("1+1") == TOKENIZER.encode("1+1")


def test_the_model_loads_with_every_dimension_that_was_asked(tmp_path: Path) -> None:
    make = MICRO.model_copy(update={"num_layers": 2})
    model = AutoModelForCausalLM.from_pretrained(made(tmp_path / "base", make=make))
    assert model.config.rope_parameters["rope_theta"] == 10_000.0
    assert len(model.model.layers) == 2
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_heads: found 3"):
        made(tmp_path / "base", make=MICRO.model_copy(update={"num_heads": 3, "num_kv_heads": 2}))
