"""A run that an earlier rlsys recorded stays readable where this rlsys computes the same.

earlier_config.yaml: config.yaml of a quickstart that an rlsys with 175 keys started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.config import load_config
from rlsys.config.replaced_keys import CONSTANTS, REPLACED
from rlsys.errors import ConfigError, RunExistsError
from rlsys.run_state.changes import refuse_changes
from rlsys.run_state.run_info import write_info
from rlsys.run_state.saved_config import read_saved_config

EARLIER = Path(__file__).parent / "earlier_config.yaml"
QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def saved(folder: Path, changes: dict[str, object] | None = None) -> Path:
    """A run directory with the earlier configuration, changed by dotted keys."""
    tree: dict[str, Any] = yaml.safe_load(EARLIER.read_text())
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    write_info(folder, {"wandb_id": "a", "started": 0.0, "folder": str(Path.cwd())})
    return folder


def value_in(tree: dict[str, Any], key: str) -> object:
    for part in key.split("."):
        tree = tree[part]
    return tree


def test_the_earlier_configuration_has_the_removed_keys_with_the_constants_of_today() -> None:
    tree = yaml.safe_load(EARLIER.read_text())
    assert {key: value_in(tree, key) for key in CONSTANTS} == {key: one.value for key, one in CONSTANTS.items()}
    assert all(value_in(tree, key) is not None for key in REPLACED if not key.startswith("run."))


def test_a_run_of_an_earlier_rlsys_is_the_same_job_today(tmp_path: Path) -> None:
    today = load_config(QUICKSTART).dated("2026-11-29").with_threads(1, 1)
    assert read_saved_config(saved(tmp_path / "run")) == today


def test_a_run_of_an_earlier_rlsys_is_resumed_also_with_other_limits(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", {"watchdog.sample_s": 7.0, "eval.confidence": 0.9, "run.stage_timeout_s": 60.0})
    refuse_changes(load_config(QUICKSTART, ["rl.steps=30"]), run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rl.sampling.top_p", 0.9),
        ("model.make.rope_theta", 5e5),
        ("model.make.tie_embeddings", False),
        ("model.make.supervised.optimizer", "adamw"),
        ("task.max_value", 30),
        ("task.eval_seed", 7),
    ],
)
def test_a_value_that_this_rlsys_cannot_compute_with_is_refused_by_key_and_both_values(
    tmp_path: Path, key: str, value: object
) -> None:
    run = saved(tmp_path / "run", {key: value})
    with pytest.raises(ConfigError) as refused:
        read_saved_config(run)
    told = f"{key} is {value!r}; it decides what the run computes, and is always {CONSTANTS[key].value!r}"
    assert told in str(refused.value) and "environment.json" in str(refused.value)
    with pytest.raises(RunExistsError, match=r"run\.name="):
        refuse_changes(load_config(QUICKSTART), run)


def test_an_unknown_key_is_refused_where_it_decides_what_the_run_computes(tmp_path: Path) -> None:
    read_saved_config(saved(tmp_path / "run", {"sampler.later": 1, "later.section.key": 1}))
    with pytest.raises(ConfigError, match=r"rl\.optim\.later is 1; .*this rlsys has no such key"):
        read_saved_config(saved(tmp_path / "run", {"rl.optim.later": 1}))


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", {"rl.steps": "many"})
    with pytest.raises(ConfigError, match=r"config\.yaml: rl\.steps: found 'many'"):
        read_saved_config(run)
    (run / "config.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="found list at the top"):
        read_saved_config(run)
