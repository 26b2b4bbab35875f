"""run.json: what outlives a run's drivers, such as the id of its wandb run."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import TypedDict

from rlsys.config import JobConfig, yaml_text
from rlsys.errors import RunExistsError
from rlsys.run_state.jsonl import CONFIG
from rlsys.utils.atomic_files import replace_file
from rlsys.utils.manifest import to_json

INFO = "run.json"


class RunInfo(TypedDict, total=False):
    """What run.json holds."""

    wandb_id: str
    started: float  # Unix, seconds
    folder: str  # in which the newest command was given
    problems: str  # hash of the training problems
    train_problems: int
    cluster: str  # address of the newest driver's Ray cluster
    auth_mode: str  # RAY_AUTH_MODE of that driver; empty: unset
    pid: int  # of that driver


def read_info(run_dir: Path) -> RunInfo:
    """
    Raises:
        RunExistsError: the file is missing or damaged.
    """
    path = run_dir / INFO
    try:
        info: RunInfo = json.loads(path.read_bytes())
        info["wandb_id"] = str(info["wandb_id"])
        return info
    except FileNotFoundError:
        why = f"it has no {INFO}, so it was written by an rlsys without checkpoints"
    except (ValueError, TypeError, KeyError) as error:
        why = f"{INFO} is damaged ({error})"
    raise RunExistsError(
        f"{run_dir} holds a run that cannot be resumed: {why}. Give this run another name (run.name=...), or "
        "start over with --fresh, which removes the existing run"
    )


def write_info(run_dir: Path, info: RunInfo) -> None:
    """Replace run.json; it is on disk before this returns."""
    replace_file(run_dir / INFO, to_json(info))


def day_of(run_dir: Path) -> str | None:
    """The day (ISO 8601) on which the run began, as its chat template writes it; None where no run is readable."""
    try:
        tree = yaml_text.read((run_dir / CONFIG).read_text("utf-8"), JobConfig, CONFIG)
        day = (tree.get("prompt") or {}).get("date") if isinstance(tree, dict) else None
        if day is not None:
            return str(day)
        started = json.loads((run_dir / INFO).read_bytes())["started"]  # of an rlsys that kept no date
        return date.fromtimestamp(started).isoformat()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # other functions report a missing or damaged run


def folder_of_command(run_dir: Path) -> Path:
    """The folder in which the run's newest command was given, to which its relative paths belong; the current folder
    where run.json does not name one."""
    try:
        return Path(json.loads((run_dir / INFO).read_bytes())["folder"])
    except (OSError, ValueError, TypeError, KeyError):
        return Path.cwd()
