"""Settings that decide what a run computes cannot change; others may."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlsys.config import dump_config
from rlsys.errors import RunExistsError
from rlsys.run_state.changes import refuse_changes
from rlsys.run_state.run_dir import RunStore
from rlsys.run_state.saved_config import FIXED
from tests.unit.run_state.run_stores import config, saved


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.seed=5", "run.seed was "),
        ("lora.rank=4", "lora.rank was 16, is 4"),
        ("rl.optim.learning_rate=1e-5", "rl.optim.learning_rate was "),
        ("rl.loss.name=ppo", "rl.loss.name was 'importance_sampling', is 'ppo'"),
        ("rl.samples_per_problem=4", "rl.samples_per_problem was "),
        ("task.train_problems=64", "task.train_problems was "),
        ("model.make.num_layers=2", "model.make.num_layers was "),
        ("rewards.function=a.b:c", "rewards.function was None, is 'a.b:c'"),
        ("eval.max_tokens=40", "eval.max_tokens was 56, is 40"),
        ("rl.loss={name: ppo, params: {clip_low_threshold: 0.9}}", "rl.loss.params was {}, is {'clip_low_threshold'"),
    ],
)
def test_a_change_of_what_the_run_computes_is_refused_by_key_and_both_values(
    tmp_path: Path, override: str, told: str
) -> None:
    saved(config(tmp_path), 1)
    before = (tmp_path / "kept" / "config.yaml").read_bytes()
    with pytest.raises(RunExistsError) as refused:
        RunStore.open(config(tmp_path, override))
    assert told in str(refused.value)
    assert "run.name=" in str(refused.value) and "--fresh" in str(refused.value)
    assert (tmp_path / "kept" / "config.yaml").read_bytes() == before
    RunStore.open(config(tmp_path)).close()  # the refused driver holds no lock


@pytest.mark.parametrize(
    "override", ["learner.num_workers=2", "sampler.num_workers=3", "eval.every_steps=2", "checkpoint.keep=5"]
)
def test_where_a_run_is_computed_may_change(tmp_path: Path, override: str) -> None:
    saved(config(tmp_path), 1)
    with RunStore.open(config(tmp_path, override), note=lambda text: None) as store:
        assert store.resume is not None


def test_a_configuration_of_an_older_rlsys_is_compared_by_the_keys_that_both_have(tmp_path: Path) -> None:
    job = config(tmp_path)
    saved(job, 1)
    path = job.run_dir / "config.yaml"
    old = yaml.safe_load(path.read_text())
    old["run"]["stage_timeout_s"] = 600.0  # a key that is gone
    old["gone"] = {"section": {"key": 1}}
    del old["checkpoint"], old["task"]["eval_share"]  # keys that are new
    path.write_text(yaml.safe_dump(old))
    refuse_changes(job, job.run_dir)
    path.write_text("run: [")
    with pytest.raises(RunExistsError, match="no configuration that this rlsys can read"):
        refuse_changes(job, job.run_dir)
    path.write_bytes(b"run: {name: kept}\n# caf\xe9\n")
    with pytest.raises(RunExistsError, match=r"can read \(.*config\.yaml, line 2: found byte 0xe9 .*wanted UTF-8"):
        refuse_changes(job, job.run_dir)


def test_every_key_that_is_fixed_is_one_of_a_job() -> None:
    flat = dump_config(config(Path("/nowhere")))
    assert all(f"{key.split('.')[0]}:" in flat for key in FIXED)
