"""What other programs make of an exported adapter, and that the export says where it is not what was trained."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from actors.cli import app
from rlsys import losses
from rlsys.config import LoraSection
from rlsys.learner.adapter_checkpoint import save_run
from rlsys.learner.export import UNTIE, export_adapter, export_merged
from rlsys.types import Array
from tests.unit.learner.test_adapter_checkpoint import SMALL, train
from tests.unit.tiny_learner import ALL_TARGETS, Models, draw, make, reference, with_run

OUTPUT_ALONE = LoraSection(rank=2, alpha=4.0, train_attn=False, train_mlp=False, train_unembed=True)
SECTIONS = {"all": ALL_TARGETS, "inner": SMALL, "output": OUTPUT_ALONE}


class Trained:
    """A learner's run, saved with its base."""

    def __init__(self, base: Path, place: Path, section: LoraSection) -> None:
        self.base = place / "the base"
        shutil.copytree(base, self.base)
        self.checkpoint = place / "a checkpoint"
        learner = train(with_run(make(self.base), section), range(2))
        save_run(learner, "run", self.checkpoint, with_optimizer=False)
        self.batch = draw()
        self.logprobs: Array = learner.forward("run", self.batch, losses.resolve("cross_entropy")).logprobs

    def apart(self, model: Path) -> float:
        """Nats between a model's folder and what was trained, at the token that differs most."""
        return float(np.abs(reference(model, self.batch, torch.float32) - self.logprobs).max())


@pytest.fixture
def trained(request: pytest.FixtureRequest, tiny_model: Models, tmp_path: Path) -> Trained:
    tied, section = request.param
    return Trained(tiny_model(tied), tmp_path, SECTIONS[section])


def merged_by_peft(trained: Trained, adapter: Path, out: Path, *, untied: bool = False) -> Path:
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    if untied:
        exec(UNTIE, {"model": model, "copy": copy, "torch": torch})
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return out


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
@pytest.mark.parametrize("trained", [(True, "all"), (True, "output")], indirect=True, ids=str)
def test_an_adapter_of_a_tied_output_is_merged_wrongly_by_peft_and_rightly_in_both_ways_that_are_offered(
    trained: Trained, tmp_path: Path
) -> None:
    (warning,) = export_adapter(trained.checkpoint, tmp_path / "an adapter")
    assert f"{trained.base} ties to its embeddings" in warning and "merge_and_unload() adds it" in warning
    assert trained.apart(merged_by_peft(trained, tmp_path / "an adapter", tmp_path / "plain")) > 0.1
    untied = merged_by_peft(trained, tmp_path / "an adapter", tmp_path / "untied", untied=True)
    assert trained.apart(untied) < 1e-5
    offered = re.search("`(rlsys export [^`]*)`", warning)
    assert offered is not None and UNTIE in warning
    answer = CliRunner().invoke(app, shlex.split(offered[1])[1:])
    assert answer.exit_code == 0, answer.output
    assert trained.apart(tmp_path / "an adapter-merged") < 1e-5


@pytest.mark.parametrize("trained", [(True, "inner"), (False, "inner"), (False, "all"), (False, "output")],
                         indirect=True, ids=str)  # fmt: skip
def test_where_peft_merges_into_what_was_trained_nothing_is_said(trained: Trained, tmp_path: Path) -> None:
    assert export_adapter(trained.checkpoint, tmp_path / "adapter") == ()
    assert trained.apart(merged_by_peft(trained, tmp_path / "adapter", tmp_path / "plain")) < 1e-5
    export_merged(trained.base, trained.checkpoint, tmp_path / "ours")
    assert trained.apart(tmp_path / "ours") < 1e-5


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
@pytest.mark.parametrize("trained", [(True, "all"), (False, "all")], indirect=True, ids=str)
def test_an_adapter_that_is_loaded_and_not_merged_is_what_was_trained(trained: Trained, tmp_path: Path) -> None:
    export_adapter(trained.checkpoint, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), tmp_path / "adapter")
    bare = AutoModelForCausalLM.from_pretrained(trained.base)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        loaded, base = model(tokens).logits, bare(tokens).logits
    export_merged(trained.base, trained.checkpoint, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    assert torch.allclose(loaded, merged, rtol=0, atol=1e-5) and not torch.allclose(loaded, base, rtol=0, atol=0.1)


@pytest.mark.parametrize("trained", [(True, "all")], indirect=True, ids=str)
def test_a_base_that_is_not_here_may_be_tied_which_is_said_with_the_way_to_name_it(
    trained: Trained, tmp_path: Path
) -> None:
    trained.base.rename(tmp_path / "moved")
    (warning,) = export_adapter(trained.checkpoint, tmp_path / "adapter")
    assert "may tie to its embeddings (its config.json is not on this machine)" in warning
    assert "--merged --base BASE`" in warning


@pytest.mark.parametrize("trained", [(True, "all")], indirect=True, ids=str)
@pytest.mark.parametrize("options", [[], ["--for-vllm"]], ids=str)
def test_the_command_warns_on_stderr_and_still_succeeds(trained: Trained, tmp_path: Path, options: list[str]) -> None:
    answer = CliRunner().invoke(app, ["export", str(trained.checkpoint), str(tmp_path / "out"), *options])
    assert answer.exit_code == 0 and answer.stdout == ""
    assert answer.stderr.count("merge_and_unload") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("trained", [(True, "all")], indirect=True, ids=str)
def test_a_base_that_leaves_tying_to_the_default_of_its_class_counts_as_what_it_is(
    trained: Trained, tmp_path: Path
) -> None:
    path = trained.base / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    tied = AutoModelForCausalLM.from_pretrained(trained.base).config.tie_word_embeddings
    assert bool(export_adapter(trained.checkpoint, tmp_path / "adapter")) is tied
