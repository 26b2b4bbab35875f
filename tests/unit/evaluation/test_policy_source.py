"""A policy to evaluate is found where people point, and what is not one is refused with what would be."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pytest

from rlsys.config import JobConfig, LoraSection, dump_config, parse_config
from rlsys.errors import CheckpointError
from rlsys.evaluation.policy_source import PolicySource, find_policy
from rlsys.learner.adapter_checkpoint import save_run
from rlsys.learner.checkpoint_files import CONFIG, MANIFEST, OPTIMIZER, WEIGHTS
from rlsys.learner.learner import Learner
from rlsys.run_state.jsonl import write_problems
from rlsys.run_state.run_dir import RunStore
from rlsys.utils.packed_folder import unpack_folder
from tests.unit.tiny_learner import Models, make, with_run

LORA = LoraSection(rank=4, alpha=8.0)


def job(root: Path, *overrides: str) -> JobConfig:
    text = """
    run: {name: run}
    model: {path: some/base}
    lora: {rank: 4, alpha: 8}
    sampler: {max_lora_rank: 16}
    """
    return parse_config(text, [f"run.dir={root}", *overrides])


@pytest.fixture
def learner(tiny_model: Models) -> Learner:
    return with_run(make(tiny_model(True)), LORA)


@pytest.fixture
def run(learner: Learner, tmp_path: Path) -> Path:
    """A run's directory with checkpoints after steps 2 and 7."""
    config = job(tmp_path / "runs")
    save_run(learner, "run", tmp_path / "state", with_optimizer=False)
    files = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    with RunStore.open(config) as store:
        for step in (2, 7):
            folder = store.run_dir / "checkpoints" / f"step-{step:06d}"
            _checkpoint(store, step, files)
            assert folder.is_dir()
        store.put("adapter", files)
        write_problems(store.run_dir, ["How many?", "How much?"], ["1", "2"])
    return config.run_dir


def _checkpoint(store: RunStore, step: int, files: dict[str, bytes]) -> None:
    from rlsys.data.problems import Epochs
    from rlsys.run_state.ledger import Ledger

    ledger = Ledger(Epochs(num_problems=8, batch=2, seed=0))
    for done in range(1, step + 1):
        ledger.draw(done, 2)
    store.save(step, files, ledger.to_bytes())


def weights(found: PolicySource, scratch: Path) -> bytes:
    unpack_folder(found.files, scratch)
    return (scratch / WEIGHTS).read_bytes()


def test_without_a_checkpoint_the_base_is_evaluated(tmp_path: Path) -> None:
    found = find_policy(job(tmp_path), None)
    assert (found.kind, found.name, found.base, found.version, found.files) == ("base", "base", "some/base", None, {})


def test_a_run_stands_for_its_newest_checkpoint(run: Path) -> None:
    found = find_policy(job(run.parent), run)
    assert (found.kind, found.name, found.version) == ("adapter", "step-000007", 0)
    assert found.path == str(run / "checkpoints" / "step-000007") and found.base == "some/base"


def test_a_policy_is_asked_on_the_day_of_its_run(run: Path, tmp_path: Path) -> None:
    path = run / "config.yaml"
    path.write_text(dump_config(job(tmp_path / "runs").dated("2026-02-03")))
    for config, checkpoint in (
        (job(tmp_path / "elsewhere"), run),
        (job(tmp_path / "elsewhere"), run / "adapter"),
        (job(tmp_path / "runs"), None),
    ):
        assert find_policy(config, checkpoint).config.prompt.date == "2026-02-03"
    assert find_policy(job(tmp_path / "elsewhere"), None).config.prompt.date == date.today().isoformat()


def test_a_step_and_the_adapter_of_a_run_can_be_named(run: Path, tmp_path: Path) -> None:
    config = job(run.parent)
    by_step, by_name = find_policy(config, run / "checkpoints" / "step-000002"), find_policy(config, run / "adapter")
    assert (by_step.name, by_name.name) == ("step-000002", "adapter")
    assert (
        weights(by_step, tmp_path / "a") == weights(by_name, tmp_path / "b") == (run / "adapter" / WEIGHTS).read_bytes()
    )


def test_what_a_run_trains_on_is_known_of_its_checkpoints(run: Path) -> None:
    for path in (run, run / "adapter", run / "checkpoints" / "step-000002"):
        assert find_policy(job(run.parent), path).trained == ("How many?", "How much?")


def test_the_optimizer_stays_behind(learner: Learner, tmp_path: Path) -> None:
    save_run(learner, "run", tmp_path / "mine", with_optimizer=True)
    found = find_policy(job(tmp_path), tmp_path / "mine")
    assert found.name == "adapter-mine" and found.trained == ()
    assert {CONFIG, WEIGHTS, MANIFEST} < set(found.files) and OPTIMIZER not in found.files


def test_a_whole_model_is_evaluated_in_place_of_the_base(tiny_model: Models, tmp_path: Path) -> None:
    model = tiny_model(True)
    found = find_policy(job(tmp_path, "model.dtype=bfloat16", "model.max_length=77"), model)
    assert (found.kind, found.base, found.files) == ("merged", str(model), {}) and found.name == f"merged-{model.name}"
    assert (found.config.model.path, found.config.model.dtype) == (str(model), "bfloat16")
    assert found.config.model.max_length == 77


def test_a_base_made_from_nothing_is_that_of_the_checkpoints_run(run: Path, tmp_path: Path) -> None:
    made = job(tmp_path / "elsewhere", "model={path: null, make: {}}")
    with pytest.raises(CheckpointError, match=r"trains its base model from scratch.*rlsys train"):
        find_policy(made, None)
    with pytest.raises(CheckpointError, match="trains its base model from scratch"):
        find_policy(made, run)
    (run / "base").mkdir()
    assert find_policy(made, run).base == run / "base"
    assert find_policy(job(run.parent, "model={path: null, make: {}}"), None).base == run / "base"


def test_an_adapter_of_another_rank_is_refused_with_both(run: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"step-000007: .*lora\.rank=4, the job 2; lora\.alpha=8\.0, the job 5\.0"
    ):
        find_policy(job(run.parent, "lora.rank=2", "lora.alpha=5"), run)


def test_what_is_no_checkpoint_is_refused_with_what_would_be_one(run: Path, tmp_path: Path) -> None:
    config = job(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, said in (
        ("nowhere", "does not exist"),
        ("file", "is not a folder"),
        ("empty", "contains no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=rf"{path}: .*{said}.*wanted a run directory, a checkpoint in it"):
            find_policy(config, tmp_path / path)


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    config = job(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        find_policy(config, config.run_dir)


def test_an_adapter_that_does_not_say_of_which_base_it_is_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "bare")
    (tmp_path / "bare" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"bare: is an adapter without rlsys-checkpoint\.json"):
        find_policy(job(tmp_path), tmp_path / "bare")


def test_a_damaged_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    file = run / "adapter" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated or damaged"):
        find_policy(job(run.parent), run / "adapter")
    manifest = run / "checkpoints" / "step-000002" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 9}))
    with pytest.raises(CheckpointError, match="does not match its own hash"):
        find_policy(job(run.parent), manifest.parent)


def test_looking_for_a_candidate_changes_nothing_in_a_run(run: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")}
    find_policy(job(run.parent), run)
    find_policy(job(run.parent), run / "adapter")
    assert {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")} == before
