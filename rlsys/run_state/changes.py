"""Which settings of a run may change when it is resumed, and the refusal of all other changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlsys.config import JobConfig
from rlsys.config.relative_paths import same_place
from rlsys.errors import ConfigError, RunExistsError
from rlsys.run_state.jsonl import CONFIG
from rlsys.run_state.run_info import day_of, folder_of_command
from rlsys.run_state.saved_config import FIXED, KEYS, read_saved_config

MAY_CHANGE = ("rl.steps",)
PATHS = ("model.path", "task.train.path", "task.eval.path")  # equal when they lead to the same place


def refuse_changes(config: JobConfig, run_dir: Path) -> None:
    """Raises RunExistsError where `config` changes a setting that decides what the run in the directory computes."""
    path = run_dir / CONFIG
    ways = "give this run another name (run.name=...), or start over with --fresh, which removes the existing run"
    try:
        before = read_saved_config(run_dir)
    except ConfigError as error:
        why = str(error).splitlines()[0]
        raise RunExistsError(f"{path} is no configuration that this rlsys can read ({why}); {ways}") from error
    day = day_of(run_dir)
    if day is not None:
        before, config = before.dated(day), config.dated(day)
    old, new = _by_key(before.model_dump(mode="json")), _by_key(config.model_dump(mode="json"))
    was, is_now = _by_key(before.model_dump()), _by_key(config.model_dump())
    for key in PATHS:
        if key in was and key in is_now and same_place(str(was[key]), str(is_now[key]), folder_of_command(run_dir)):
            old[key] = new[key]
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key.startswith(FIXED) and key not in MAY_CHANGE and old.get(key) != new.get(key)
    ]
    if changed:
        raise RunExistsError(
            f"{run_dir} holds a run with other settings: {'; '.join(changed)}. Restore the old values to resume that "
            f"run, {ways}"
        )


def _by_key(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted key -> value. A section that is left out, such as model.make, is the same as a key without a value."""
    values: dict[str, object] = {}
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and key not in KEYS:
            values |= _by_key(value, key + ".")
        elif value is not None:
            values[key] = value
    return values
