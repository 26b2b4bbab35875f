"""Paths of saved states: ``rlsys://<model id>/<kind>/<name>``, with the structure of Tinker's paths, or a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from rlsys.errors import CheckpointError
from rlsys.utils.shell_paths import expand

Kind = Literal["weights", "sampler_weights"]
# An id has no ".", which stands for ":" in the name of its folder: two ids never share one.
_PATH = re.compile(r"(?:rlsys|tinker|mint)://([A-Za-z0-9][A-Za-z0-9_:-]*)/(weights|sampler_weights)/([^/]+)")


def path_of(model_id: str, kind: Kind, name: str) -> str:
    return f"rlsys://{model_id}/{kind}/{name}"


def given(path: str) -> str:
    """Make a user's path of a saved state independent of the process: expand ``~`` and variables, and make a relative
    folder absolute, in the user's process.

    Raises:
        ConfigError: the path contains a variable or a user that does not exist.
    """
    return path if "://" in path else str(Path(expand(path)).absolute())


def folder_of(root: Path, path: str) -> Path:
    """Folder of a saved state: below `root` for an ``rlsys://`` path, or else the path itself.

    Raises:
        CheckpointError: the path has another form, or contains an invalid name.
    """
    if "://" not in path:
        return Path(path)
    match = _PATH.fullmatch(path)
    if match is None:
        raise CheckpointError(
            f"{path!r} is not a saved state; wanted a path returned by save_state or save_weights_for_sampler "
            "(rlsys://<model id>/weights/<name> or .../sampler_weights/<name>), or a checkpoint folder"
        )
    return new_folder_of(root, *match.groups())


def new_folder_of(root: Path, model_id: str, kind: str, name: str) -> Path:
    """Folder for a new state of that name. Raises CheckpointError as `folder_of` does."""
    from rlsys.learner.checkpoint_files import checkpoint_path

    return checkpoint_path(root / model_id.replace(":", ".") / kind, name)
