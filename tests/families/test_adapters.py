"""Adapters of each family: where they go, and that PEFT and a merged model give what the learner gives."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig

from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.errors import ConfigError
from rlsys.learner.export import export_adapter, export_merged
from rlsys.learner.learner import Learner
from rlsys.modeling.module_roles import names, roles_of, skeleton
from rlsys.modeling.text_part import load_language_model, load_whole
from tests.families.adapted import LENGTH, MODELS, TOKENS, Adapted, distance, logprobs_of
from tests.families.tiny_composites import COMPOSITES, Composite
from tests.families.tiny_models import COMMON, FAMILIES, MIXTURES, Family


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, trained_of: Callable[[str], Adapted]) -> Adapted:
    return trained_of(request.param)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_roles_are_found_in_a_model_and_in_its_configuration_alone(family: Family) -> None:
    model = family.make()
    found = roles_of(model)
    assert set(names(found.attention)) == set(family.attention)
    assert len(found.attention) == 3 * len(family.attention)
    assert found.unembedding == ("lm_head",)
    if family in MIXTURES:
        assert found.mlp == () and found.experts is not None
    else:
        assert set(names(found.mlp)) == set(family.mlp) and found.experts is None
    assert roles_of(skeleton(AutoConfig.for_model(**model.config.to_dict()))) == found


def test_peft_loads_the_saved_adapter_onto_the_model(trained: Adapted) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        whole = load_whole(trained.folder, dtype=torch.float32, attn_implementation="eager")
        model = PeftModel.from_pretrained(whole, trained.checkpoints / "run")
    ours = trained.logprobs("run")
    assert distance(logprobs_of(model), ours) < trained.bound
    assert abs(ours - trained.logprobs(None)).mean() > 100 * trained.bound, "the adapter has to be large"


def test_a_merged_model_is_base_and_adapter(trained: Adapted, tmp_path: Path) -> None:
    export_merged(trained.folder, trained.checkpoints / "run", tmp_path / "merged")
    model = load_whole(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    assert distance(logprobs_of(model), trained.logprobs("run")) < trained.bound


def test_an_export_warns_of_tied_outputs_alone_and_a_merged_model_ties_nothing_anywhere(
    trained: Adapted, tmp_path: Path
) -> None:
    base = load_whole(trained.folder, dtype=torch.float32)
    is_tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    outputs = [key for key in trained.learner.runs.state("run").weights if key.startswith("lm_head.")]
    warnings = export_adapter(trained.checkpoints / "run", tmp_path / "adapter")
    assert len(warnings) == (is_tied and bool(outputs))
    assert export_adapter(trained.checkpoints / "inner", tmp_path / "inner") == ()
    if warnings:
        export_merged(trained.folder, trained.checkpoints / "run", tmp_path / "merged")
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        parts = [part for part in (config, config.get("text_config", {})) if "tie_word_embeddings" in part]
        assert parts and not any(part["tie_word_embeddings"] for part in parts)


@pytest.mark.parametrize("family", MIXTURES, ids=lambda family: family.name)
def test_experts_are_refused_with_the_way_out(family: Family, tmp_path: Path) -> None:
    folder = family.save(tmp_path / "base")
    learner = Learner(folder, ModelSection(path=str(folder), max_length=LENGTH), LearnerSection())
    with pytest.raises(ConfigError, match=r"is a mixture of experts .* set lora\.train_mlp=false"):
        learner.runs.create("run", LoraSection(), seed=1)


@pytest.mark.parametrize(("name", "is_cut"), [("glm4", True), ("phi3", False)])
def test_for_vllm_a_fused_module_is_cut_where_vllm_has_it_in_parts(
    name: str, is_cut: bool, trained_of: Callable[[str], Adapted], tmp_path: Path
) -> None:
    trained = trained_of(name)
    export_adapter(trained.checkpoints / "run", tmp_path / "peft")
    export_adapter(trained.checkpoints / "run", tmp_path / "vllm", for_vllm=True)
    whole, cut = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("peft", "vllm"))
    targets = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())["target_modules"]
    assert ("gate_up_proj" in targets) != is_cut
    path = "base_model.model.model.layers.0.mlp"
    b = whole[f"{path}.gate_up_proj.lora_B.weight"]
    if is_cut:
        parts = [cut[f"{path}.{part}.lora_B.weight"] for part in ("gate_proj", "up_proj")]
        assert torch.equal(torch.cat(parts), b)
        assert torch.equal(cut[f"{path}.up_proj.lora_A.weight"], whole[f"{path}.gate_up_proj.lora_A.weight"])
    else:
        assert cut.keys() == whole.keys()


@pytest.mark.parametrize("composite", COMPOSITES, ids=lambda composite: composite.name)
def test_a_text_part_is_the_whole_model_without_its_towers(composite: Composite, tmp_path: Path) -> None:
    folder = composite.save(tmp_path / "base")
    whole, part = (load(folder, dtype=torch.float32).eval() for load in (load_whole, load_language_model))
    tokens = torch.from_numpy(TOKENS[None]).long()
    with torch.no_grad():
        assert torch.allclose(part(tokens).logits, whole(tokens).logits, rtol=0, atol=1e-4)
    assert not any("vision" in name for name, _ in part.named_modules())
    learner = Learner(folder, ModelSection(path=str(folder), max_length=LENGTH), LearnerSection())
    learner.runs.create("run", LoraSection(rank=2), seed=1)
    assert all(name.startswith("model.language_model.layers.") for name in learner.runs.state("run").weights)
    (greedy,) = learner.greedy([TOKENS[:40]], 3, [])
    with torch.no_grad():
        assert greedy[0] == int(whole(tokens[:, :40]).logits[0, -1].argmax())


def test_a_checkpoint_of_parts_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llava", text_config={"model_type": "llama", **COMMON})
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'llava', a multimodal model.* gemma3 and mistral3"):
        load_language_model(tmp_path, dtype=torch.float32)
