"""Resolves relative paths against the folder in which the command was given, on whatever node an actor reads them.

A job keeps its paths as its author wrote them: config.yaml stays readable, and a project can be moved. Actors get
absolute paths: a relative path that exists in the folder of the command becomes absolute. A text that names nothing
there stays unchanged if it may be a name on the Hub; otherwise it becomes absolute too, so that the error about it
names the folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from rlsys.config import JobConfig, SourceSection

HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def resolve_path(path: str, *folders: Path) -> str:
    """The path in the first of `folders` (default: the current folder) that has it."""
    places = [folder.absolute() / path for folder in folders or (Path.cwd(),)]
    found = next((place for place in places if os.path.lexists(place)), None)
    if found is None and HUB_NAME.fullmatch(path):
        return path
    return str(found or places[0])


def resolve_paths(job: JobConfig, *folders: Path) -> JobConfig:
    """The job for its actors: every path through ``resolve_path``."""
    task = {
        split: source.model_copy(update={"path": resolve_path(source.path, *folders)})
        for split, source in (("train", job.task.train), ("eval", job.task.eval))
        if isinstance(source, SourceSection)
    }
    model = {} if job.model.path is None else {"path": resolve_path(job.model.path, *folders)}
    return job.model_copy(
        update={
            "run": job.run.model_copy(update={"dir": str(Path(job.run.dir).absolute())}),  # created if missing
            "model": job.model.model_copy(update=model),
            "task": job.task.model_copy(update=task),
        }
    )


def same_place(old: str, new: str, old_folder: Path) -> bool:
    """Whether two spellings name one file, the old one given in `old_folder`, the new one in the current folder."""
    return os.path.realpath(resolve_path(old, old_folder, Path.cwd())) == os.path.realpath(resolve_path(new))
