"""Which files of a run directory rlsys wrote: --fresh removes only these, and a foreign directory is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from rlsys.config import JobConfig, yaml_text
from rlsys.errors import RunExistsError
from rlsys.run_state.jsonl import CONFIG, Note
from rlsys.run_state.lock import LOCK
from rlsys.run_state.resume import CHECKPOINTS
from rlsys.run_state.run_info import INFO
from rlsys.utils.atomic_files import remove

_OLD = re.compile(r"\.(step-\d{6,}|base|adapter)\.old")
_WRITTEN = re.compile(
    r"lock|run\.json|config(\.\d+)?\.yaml|checkpoints|base|adapter|eval|steps|wandb|tensorboard|report\.html"
    r"|(metrics|rollouts|groups|problems)\.jsonl|environment\.json|errors\.log"
)
_TEMPORARY = re.compile(  # of rlsys.utils.atomic_files
    r"\.(step-\d{6,}|base|adapter|config|run|metrics|rollouts|groups|problems|environment|report)\..*"
)


def refuse_foreign(run_dir: Path) -> None:
    """Raises RunExistsError where the directory holds files and no run of rlsys."""
    if not run_dir.is_dir() or _is_run(run_dir):
        return
    begun = {LOCK, INFO, "eval"}  # of a driver that died before it wrote the configuration, or of `rlsys eval`
    foreign = sorted(path.name for path in run_dir.iterdir() if path.name not in begun and not _is_temporary(path))
    if foreign:
        raise RunExistsError(
            f"{run_dir} holds files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}) but no run of "
            f"rlsys ({INFO} and the {CONFIG} of a job), so nothing in it is changed, even with --fresh. Give the run "
            "another name (run.name=...) or run.dir; a run with damaged files has to be removed by hand"
        )


def refuse_link(run_dir: Path) -> None:
    """Raises RunExistsError where --fresh would remove files through a symbolic link."""
    if run_dir.is_symlink():
        raise RunExistsError(
            f"{run_dir} is a symbolic link to {run_dir.resolve()}, and --fresh removes nothing through a link; give "
            "the folder itself (run.dir=... run.name=...), or remove the link"
        )


def remove_run(run_dir: Path, note: Note) -> None:
    """Remove what rlsys wrote except the lock. config.yaml goes last: a directory that is half emptied is still a
    run."""
    others = []
    for path in sorted(run_dir.iterdir(), key=lambda path: path.name == CONFIG):
        if path.name == LOCK:
            continue
        if _WRITTEN.fullmatch(path.name) or _is_temporary(path):
            remove(path)
        else:
            others.append(path.name)
    if others:
        note(f"{run_dir}: --fresh keeps files that rlsys did not write: {', '.join(sorted(others))}")


def repair(run_dir: Path, note: Note) -> None:
    """Finish what a dead writer left: remove a partial folder, restore a folder that was moved away for it."""
    checkpoints = run_dir / CHECKPOINTS
    for path in [*run_dir.iterdir(), *(checkpoints.iterdir() if checkpoints.is_dir() else ())]:
        old = _OLD.fullmatch(path.name)
        if old and not (path.parent / old[1]).exists():
            os.rename(path, path.parent / old[1])
        elif _is_temporary(path):
            note(f"{path.parent}: removed {path.name}, left incomplete by a driver that died")
            remove(path)


def _is_run(run_dir: Path) -> bool:
    """By what an rlsys wrote: other programs have a config.yaml too."""
    try:
        tree = yaml_text.read((run_dir / CONFIG).read_text("utf-8"), JobConfig, CONFIG)
        if not isinstance(tree, dict):
            raise TypeError(type(tree))
        is_job = {"run", "model"} <= tree.keys() <= JobConfig.model_fields.keys()
        if is_job and all(isinstance(tree[name], dict) for name in ("run", "model")) and "name" in tree["run"]:
            return True
    except FileNotFoundError:
        return False  # it is written last, and removed last
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # damaged, or of another program
    try:
        return {"wandb_id", "started"} <= json.loads((run_dir / INFO).read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None
