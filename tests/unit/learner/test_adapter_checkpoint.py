"""A run comes back to the bit, and nothing that is not whole and its own is loaded."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlsys import losses
from rlsys.config import LoraSection
from rlsys.datums import take
from rlsys.errors import CheckpointError, StorageError
from rlsys.learner.adapter_checkpoint import load_run, read_adapter, restore_run, save_run
from rlsys.learner.checkpoint_files import checkpoint_path, read_info
from rlsys.learner.export import export_adapter, export_merged
from rlsys.learner.learner import Learner
from rlsys.types import AdamParams
from rlsys.utils import manifest
from tests.unit.tiny_learner import (
    ALL_TARGETS,
    Models,
    assert_same_bits,
    draw,
    lend,
    make,
    reference,
    run_bytes,
    state,
    weights,
    with_run,
)

LOSS = losses.resolve("importance_sampling")
ADAM = AdamParams(1e-2, weight_decay=0.1)
SMALL = LoraSection(rank=2, alpha=3.0, train_mlp=False)


def train(learner: Learner, steps: range, run: str = "run") -> Learner:
    for step in steps:
        learner.forward_backward(run, draw(seed=step), LOSS)
        learner.optim_step(run, ADAM)
    return learner


@pytest.fixture(scope="module")
def original(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two steps, with its optimizer. Copies of it are damaged, overwritten and loaded."""
    folder = tmp_path_factory.mktemp("original") / "saved"
    save_run(train(with_run(make(tiny_model(True))), range(2)), "run", folder, with_optimizer=True)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "saved")


@pytest.fixture(scope="module")
def loader(tiny_model: Models) -> Learner:
    """A learner after a step, with a gradient, which loads what is refused."""
    learner = train(with_run(make(tiny_model(True))), range(1))
    learner.forward_backward("run", draw(seed=3), LOSS)
    return learner


def test_three_steps_saved_and_three_more_are_six_to_the_bit(tiny_model: Models, tmp_path: Path) -> None:
    straight = train(with_run(lend(tiny_model(True))), range(6))
    first = train(with_run(lend(tiny_model(True))), range(3))
    save_run(first, "run", tmp_path / "half", with_optimizer=True)
    second = lend(tiny_model(True))
    info = restore_run(second, "resumed", tmp_path / "half", with_optimizer=True)
    assert (info.version, info.lora, info.has_optimizer, info.run_id) == (3, ALL_TARGETS, True, "run")
    assert_same_bits(state(second, "resumed"), state(first, "run"))
    train(second, range(3, 6), "resumed")
    assert_same_bits(state(second, "resumed"), state(straight, "run"))
    assert second.runs.version("resumed") == 6


def test_weights_alone_start_the_moments_anew(tiny_model: Models, saved: Path) -> None:
    learner = train(with_run(lend(tiny_model(True))), range(5))
    learner.forward_backward("run", draw(), LOSS)
    load_run(learner, "run", saved, with_optimizer=False)
    assert not learner.runs.has_gradient("run")
    fresh = lend(tiny_model(True))
    restore_run(fresh, "run", saved, with_optimizer=False)
    train(learner, range(7, 8))
    assert_same_bits(state(learner, "run"), state(train(fresh, range(7, 8)), "run"))
    assert learner.runs.version("run") == fresh.runs.version("run") == 3


def test_a_run_without_steps_comes_back_without_moments(tiny_model: Models, tmp_path: Path) -> None:
    learner = lend(tiny_model(True))
    learner.runs.create("new", SMALL, 3)
    save_run(learner, "new", tmp_path / "new", with_optimizer=True)
    restore_run(learner, "again", tmp_path / "new", with_optimizer=True)
    assert_same_bits(state(train(learner, range(1), "again"), "again"), state(train(learner, range(1), "new"), "new"))


def test_saving_changes_nothing_and_leaves_accumulated_gradients_out(tiny_model: Models, tmp_path: Path) -> None:
    learner = train(with_run(lend(tiny_model(True))), range(1))
    save_run(learner, "run", tmp_path / "before", with_optimizer=True)
    learner.forward_backward("run", draw(seed=4), LOSS)
    owned = state(learner, "run")
    save_run(learner, "run", tmp_path / "after", with_optimizer=True)
    assert_same_bits(state(learner, "run"), owned)
    assert learner.runs.has_gradient("run")
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "rlsys-checkpoint.json"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_loading_one_run_leaves_the_others(tiny_model: Models, saved: Path) -> None:
    learner = with_run(lend(tiny_model(True)), run="run")
    with_run(learner, SMALL, run="other", seed=5)
    train(learner, range(2), "other")
    before = state(learner, "other")
    load_run(learner, "run", saved, with_optimizer=True)
    restore_run(learner, "third", saved, with_optimizer=True)
    train(learner, range(2), "third")
    assert_same_bits(state(learner, "other"), before)


def test_a_folder_holds_safetensors_and_json_and_says_what_it_is(tiny_model: Models, saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "rlsys-checkpoint.json",
    ]
    assert {tensor.dtype for tensor in load_file(saved / "adapter_model.safetensors").values()} == {torch.float32}
    assert {file.stat().st_mode & 0o777 for file in saved.iterdir()} == {0o644}
    info = read_info(saved)
    assert (info.run_id, info.version, info.lora, info.has_optimizer) == ("run", 2, ALL_TARGETS, True)
    assert (
        info.base_name
        == str(tiny_model(True))
        == json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    assert info.base.summary == "qwen3, vocabulary 64, hidden size 32, 2 layers, 4 heads"
    again, tensors = read_adapter(saved)
    assert again == info
    assert tensors["lm_head.lora_A"].shape == (4, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_peft_gives_a_checkpoint_the_same_logprobs(tiny_model: Models, tied: bool, tmp_path: Path) -> None:
    learner = train(with_run(lend(tiny_model(tied))), range(2))
    batch = take(draw(), [0])
    wanted = learner.forward("run", batch, losses.resolve("cross_entropy")).logprobs
    save_run(learner, "run", tmp_path / "saved", with_optimizer=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(tied), attn_implementation="eager")
    model = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    tokens, targets = (torch.from_numpy(ids.astype(np.int64)) for ids in (batch.tokens, batch.targets))
    logp = torch.log_softmax(model(tokens[None]).logits[0], -1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(wanted, logp.detach().numpy(), rtol=0, atol=2e-5)


def test_a_half_precision_base_is_the_same_base(tiny_model: Models, saved: Path) -> None:
    restore_run(lend(tiny_model(True), torch.bfloat16), "run", saved, with_optimizer=True)


def test_a_checkpoint_is_overwritten_only_where_asked_and_only_a_checkpoint(tiny_model: Models, saved: Path) -> None:
    learner = train(with_run(lend(tiny_model(True))), range(3))
    with pytest.raises(CheckpointError, match="already there"):
        save_run(learner, "run", saved, with_optimizer=True)
    assert read_info(saved).version == 2
    save_run(learner, "run", saved, with_optimizer=False, overwrite=True)
    assert (read_info(saved).version, read_info(saved).has_optimizer) == (3, False)
    assert [entry.name for entry in saved.parent.iterdir()] == ["saved"]
    (saved.parent / "home").mkdir()
    (saved.parent / "home" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="only such a one is overwritten"):
        save_run(learner, "run", saved.parent / "home", with_optimizer=False, overwrite=True)


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_save_that_fails_leaves_what_was_there(
    tiny_model: Models, saved: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = train(with_run(lend(tiny_model(True))), range(3))
    real, calls = getattr(os, call), []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:  # rename: the old one has stepped aside, the new one is about to appear
            raise OSError("no space left")
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(StorageError, match="cannot be written: no space left"):
        save_run(learner, "run", saved, with_optimizer=True, overwrite=True)
    monkeypatch.undo()
    assert [entry.name for entry in saved.parent.iterdir()] == ["saved"]
    load_run(learner, "run", saved, with_optimizer=True)
    assert learner.runs.version("run") == 2


def test_every_file_and_the_folder_are_on_disk_before_the_name_appears(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    save_run(with_run(lend(tiny_model(True))), "run", tmp_path / "saved", with_optimizer=True)
    at = events.index("rename")
    assert set(events[: at - 1]) == {file.name for file in (tmp_path / "saved").iterdir()}
    assert events[at - 1].startswith(".saved.")  # the temporary folder
    assert events[at + 1 :] == [tmp_path.name]


def rewritten(**changes: object) -> Callable[[Path], None]:
    """The manifest with other entries and the right hash of them: what a forger would do."""

    def forge(path: Path) -> None:
        body = {**json.loads((path / "rlsys-checkpoint.json").read_text()), **changes}
        del body["digest"]
        text = json.dumps({**body, "digest": manifest.digest(body)})
        (path / "rlsys-checkpoint.json").write_text(text)

    return forge


def resealed(
    change: Callable[[dict[str, torch.Tensor]], None], name: str = "adapter_model.safetensors"
) -> Callable[[Path], None]:
    """Other tensors, and a manifest that vouches for them."""

    def forge(path: Path) -> None:
        tensors = load_file(path / name)
        change(tensors)
        save_file(tensors, path / name)
        files = json.loads((path / "rlsys-checkpoint.json").read_text())["files"]
        rewritten(files={**files, name: manifest.file_entry((path / name).read_bytes())})(path)

    return forge


def truncated(name: str) -> Callable[[Path], object]:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 7)


def flipped(name: str) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[-3] ^= 1
        (path / name).write_bytes(content)

    return flip


def linked(path: Path) -> None:
    shutil.move(path / "adapter_model.safetensors", path.parent / "elsewhere.safetensors")
    (path / "adapter_model.safetensors").symlink_to(path.parent / "elsewhere.safetensors")


def edited(path: Path) -> None:
    manifest = path / "rlsys-checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 9'))


def renamed_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.x"] = tensors.pop(sorted(tensors)[0])


def missing_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]] = tensors[sorted(tensors)[0]].half()


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


ADAPTER = "adapter_model.safetensors"
OUTSIDE = {ADAPTER: {"bytes": 1, "blake2b": "0"}, "../secret": {"bytes": 1, "blake2b": "0"}}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "found no folder"),
    "truncated weights": (truncated(ADAPTER), f"{ADAPTER} is truncated or damaged: found .*bytes.*wanted"),
    "truncated optimizer": (truncated("optimizer.safetensors"), "optimizer.safetensors is truncated or damaged"),
    "truncated manifest": (truncated("rlsys-checkpoint.json"), "is no JSON, so it is damaged"),
    "a flipped bit": (flipped(ADAPTER), "is truncated or damaged"),
    "an edited manifest": (edited, "does not match its own hash"),
    "no manifest": (lambda path: (path / "rlsys-checkpoint.json").unlink(), "no checkpoint of rlsys: rlsys-.* missing"),
    "no weights": (lambda path: (path / ADAPTER).unlink(), f"{ADAPTER} is missing"),
    "a link": (linked, f"{ADAPTER} is a link, which may lead out of it"),
    "a file outside": (rewritten(files=OUTSIDE), r"names the files .*\.\./secret.*; wanted those of the format"),
    "of another program": (rewritten(format="peft"), "is not of a checkpoint of rlsys"),
    "of the future": (rewritten(format_version=2), "found format version 2; this rlsys reads 1"),
    "no rank": (rewritten(lora={"rank": 0}), "lacks what the format has"),
    "no files": (rewritten(files={}), "names the files"),
    "names without hashes": (rewritten(files=["adapter_config.json", ADAPTER]), "lacks what the format has"),
    "a strange tensor": (resealed(renamed_tensor), "found tensor 'model.x'"),
    "a tensor too few": (resealed(missing_tensor), "lora_A is missing"),
    "another dtype": (resealed(other_dtype), r"found \(4, 32\) torch.float16; wanted \(4, 32\) torch.float32"),
    "not finite": (resealed(not_finite), "holds values that are not finite"),
    "half an optimizer": (resealed(missing_tensor, "optimizer.safetensors"), "optimizer state: .* is missing"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_or_foreign_is_refused_and_the_run_is_as_before(
    loader: Learner, saved: Path, damage: Callable[[Path], object], message: str
) -> None:
    before = state(loader, "run")
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_run(loader, "run", saved, with_optimizer=True)
    assert str(saved) in str(raised.value)
    assert_same_bits(state(loader, "run"), before)
    assert (loader.runs.version("run"), loader.runs.has_gradient("run")) == (1, True)
    with pytest.raises(CheckpointError):
        restore_run(loader, "new", saved, with_optimizer=True)
    assert loader.runs.ids == ["run"]


def test_a_checkpoint_of_another_base_or_another_section_is_refused(
    tiny_model: Models, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="of a base of another shape: found qwen3, vocabulary 64"):
        restore_run(lend(tiny_model(False)), "run", saved, with_optimizer=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(True))
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    model.save_pretrained(tmp_path / "trained on")
    with pytest.raises(CheckpointError, match=r"same shape .* with other weights"):
        restore_run(make(tmp_path / "trained on"), "run", saved, with_optimizer=True)
    learner = lend(tiny_model(True))
    learner.runs.create("run", SMALL, 0)
    with pytest.raises(CheckpointError, match=r"found rank 4, alpha 8.0.*; wanted the run's rank 2, alpha 3.0"):
        load_run(learner, "run", saved, with_optimizer=True)


def test_an_optimizer_that_was_not_saved_is_not_made_up(tiny_model: Models, tmp_path: Path) -> None:
    learner = train(with_run(lend(tiny_model(True))), range(1))
    save_run(learner, "run", tmp_path / "weights", with_optimizer=False)
    with pytest.raises(CheckpointError, match="saved without optimizer state"):
        load_run(learner, "run", tmp_path / "weights", with_optimizer=True)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\\b", "a\n", "a b", "x" * 129])
def test_a_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="checkpoint name"):
        checkpoint_path(tmp_path, name)


def test_a_plain_name_is_a_folder_under_the_root(tmp_path: Path) -> None:
    assert checkpoint_path(tmp_path, "step-000010.v2_x") == tmp_path / "step-000010.v2_x"


def test_an_exported_adapter_is_what_peft_takes_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    export_adapter(saved, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["adapter_config.json", ADAPTER]
    assert all(
        (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes() for name in os.listdir(tmp_path / "out")
    )
    with pytest.raises(CheckpointError, match="already there"):
        export_adapter(saved, tmp_path / "out")
    flipped(ADAPTER)(saved)
    with pytest.raises(CheckpointError, match="damaged"):
        export_adapter(saved, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_model_is_base_and_adapter(tiny_model: Models, tied: bool, tmp_path: Path) -> None:
    learner = train(with_run(lend(tiny_model(tied))), range(2))
    save_run(learner, "run", tmp_path / "saved", with_optimizer=False)
    base = tmp_path / "base"
    shutil.copytree(tiny_model(tied), base)
    (base / "tokenizer.json").write_text("{}")
    export_merged(base, tmp_path / "saved", tmp_path / "merged")
    batch = draw()
    wanted = learner.forward("run", batch, losses.resolve("cross_entropy")).logprobs
    np.testing.assert_allclose(reference(tmp_path / "merged", batch, torch.float32), wanted, rtol=0, atol=5e-5)
    bare = learner.forward(None, batch, losses.resolve("cross_entropy")).logprobs
    assert np.abs(bare - wanted).mean() > 0.1
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    learner.runs.create("inner", SMALL, 0)
    save_run(train(learner, range(1), "inner"), "inner", tmp_path / "inner", with_optimizer=False)
    export_merged(base, tmp_path / "inner", tmp_path / "kept")  # an adapter that leaves the output alone
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["tie_word_embeddings"] is tied
    wanted = learner.forward("inner", batch, losses.resolve("cross_entropy")).logprobs
    np.testing.assert_allclose(reference(tmp_path / "kept", batch, torch.float32), wanted, rtol=0, atol=5e-5)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "kept").iterdir()} == {0o644}
    with pytest.raises(CheckpointError, match=r"cannot be merged into .*another shape"):
        export_merged(tiny_model(not tied), tmp_path / "saved", tmp_path / "wrong")


def held_bytes() -> int:
    """Of every tensor that is alive, gradients included, each storage once."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    alive += [tensor.grad for tensor in alive if tensor.is_leaf and tensor.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    return sum(storages.values())


def test_a_further_run_takes_its_adapter_its_gradient_and_its_moments_and_no_more(tiny_model: Models) -> None:
    learner = train(with_run(make(tiny_model(True)), run="first"), range(1), "first")
    for run, section in (("small", SMALL), ("large", ALL_TARGETS)):
        before = held_bytes()
        learner.runs.create(run, section, 1)
        size = sum(weight.nbytes for weight in weights(learner, run).values())
        assert run_bytes(learner, run).total == size
        train(learner, range(2), run)
        learner.forward_backward(run, draw(), LOSS)
        found = run_bytes(learner, run)
        steps = 4 * len(weights(learner, run))  # AdamW counts steps in a float per tensor
        assert (found.weights, found.gradient, found.optimizer) == (size, size, 2 * size + steps)
        assert held_bytes() - before == found.total
    learner.runs.drop("large")
    assert held_bytes() == before


def test_a_folder_that_is_no_checkpoint_is_refused_with_one_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_info(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is no checkpoint of rlsys: rlsys-checkpoint.json is missing"
