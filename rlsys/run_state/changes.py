"""Which settings of a run may change when it is resumed, and the refusal of all other changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlsys.config import JobConfig, keys, yaml_text
from rlsys.config.relative_paths import same_place
from rlsys.errors import ConfigError, RunExistsError
from rlsys.run_state.jsonl import CONFIG
from rlsys.run_state.run_info import day_of, folder_of_command
from rlsys.utils.text_files import read_text

# Keys that decide what a run computes. Others (where it runs, how often it is evaluated) may change between drivers.
FIXED = (
    *("run.seed", "model.", "task.", "prompt.", "turns.max_turns", "turns.python_tool", "lora.", "rl."),
    *("rewards.function", "rewards.correct", "rewards.format", "rewards.length", "eval.max_tokens"),
)
MAY_CHANGE = ("rl.steps",)
PATHS = ("model.path", "task.train.path", "task.eval.path")  # equal when they lead to the same place
_KEYS = frozenset(keys())


def refuse_changes(config: JobConfig, run_dir: Path) -> None:
    """Raises RunExistsError where `config` changes a setting that decides what the run in the directory computes."""
    path = run_dir / CONFIG
    ways = "give this run another name (run.name=...), or start over with --fresh, which removes the existing run"
    try:
        tree = yaml_text.read(read_text(path, str(path)), JobConfig, str(path))
        # keys that this rlsys no longer has are dropped, and keys that are new to it had their defaults
        before = JobConfig.model_validate(_only_keys_of_today(tree))
    except (ConfigError, ValidationError, AttributeError) as error:
        why = str(error).splitlines()[0]
        raise RunExistsError(f"{path} is no configuration that this rlsys can read ({why}); {ways}") from error
    day = day_of(run_dir)
    if day is not None:
        before, config = before.dated(day), config.dated(day)
    old, new = _by_key(before.model_dump(mode="json")), _by_key(config.model_dump(mode="json"))
    was, is_now = _by_key(before.model_dump()), _by_key(config.model_dump())
    for key in PATHS:
        if key in was and key in is_now and same_place(was[key], is_now[key], folder_of_command(run_dir)):
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


def _only_keys_of_today(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The part of a configuration whose keys this rlsys has."""
    kept = {}
    for name, value in tree.items():
        key = prefix + name
        is_section = any(known.startswith(key + ".") for known in _KEYS)
        if is_section and isinstance(value, dict):
            kept[name] = _only_keys_of_today(value, key + ".")
        elif is_section or key in _KEYS:
            kept[name] = value
    return kept


def _by_key(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value. A section that is left out, such as model.make, is the same as a key without a value."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and key not in _KEYS:
            values |= _by_key(value, key + ".")
        elif value is not None:
            values[key] = value
    return values
