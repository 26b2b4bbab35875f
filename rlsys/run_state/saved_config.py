"""The configuration in a run's directory, which an earlier or a later rlsys may have written.

Keys that are new have their defaults. A key that was removed is dropped if rlsys still does what its value asks for, or
if it did not decide what the run computes; otherwise the run cannot be resumed or replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlsys.config import JobConfig, keys, yaml_text
from rlsys.config.load import validated
from rlsys.config.replaced_keys import CONSTANTS
from rlsys.errors import ConfigError
from rlsys.run_state.jsonl import CONFIG
from rlsys.utils.text_files import read_text

# Keys that decide what a run computes. Others (where it runs, how often it is evaluated) may change between drivers.
FIXED = (
    *("run.seed", "model.", "task.", "prompt.", "turns.max_turns", "turns.python_tool", "lora.", "rl."),
    *("rewards.function", "rewards.correct", "rewards.format", "rewards.length", "eval.max_tokens"),
)
KEYS = frozenset(keys())
_KEEP = "Resume or replay the run with the rlsys that recorded it, whose version is in environment.json"


def read_saved_config(run_dir: Path) -> JobConfig:
    """
    Raises:
        ConfigError: there is no configuration, it is damaged, or it holds a setting of another rlsys that decides what
            the run computes.
    """
    path = run_dir / CONFIG
    tree = yaml_text.read(read_text(path, str(path)), JobConfig, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {type(tree).__name__} at the top; wanted the sections of a job")
    return validated(_only_keys_of_today(tree, path), str(path))


def with_threads_of(run_dir: Path, config: JobConfig) -> JobConfig:
    """The job with the thread counts of the run in the directory where it sets none; unchanged where there is no
    readable run. Sums may depend on the number of threads, so a run keeps the one that it began with."""
    if config.learner.threads is not None and config.sampler.threads is not None:
        return config
    try:
        saved = read_saved_config(run_dir)
    except ConfigError:
        return config  # other functions report a missing or damaged run
    return config.with_threads(saved.learner.threads, saved.sampler.threads)


def _only_keys_of_today(tree: Mapping[str, object], path: Path, prefix: str = "") -> dict[str, object]:
    """The part of a configuration whose keys this rlsys has."""
    kept: dict[str, object] = {}
    for name, value in tree.items():
        key = prefix + name
        is_section = any(known.startswith(key + ".") for known in KEYS)
        if is_section and isinstance(value, dict):
            kept[name] = _only_keys_of_today(value, path, key + ".")
        elif is_section or key in KEYS:
            kept[name] = value
        elif key in CONSTANTS:
            _refuse_other_value(key, value, path)
        elif key.startswith(FIXED):
            raise ConfigError(
                f"{path}: {key} is {value!r}; it decides what the run computes, and this rlsys has no such key. {_KEEP}"
            )
    return kept


def _refuse_other_value(key: str, value: object, path: Path) -> None:
    constant = CONSTANTS[key].value
    if value != constant:
        raise ConfigError(
            f"{path}: {key} is {value!r}; it decides what the run computes, and is always {constant!r} in this rlsys. "
            f"{_KEEP}"
        )
