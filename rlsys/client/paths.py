"""Names of saved states: ``rlsys://<model id>/<kind>/<name>``, in the scheme of Tinker's paths; or a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from rlsys.errors import CheckpointError
from rlsys.utils.shell_paths import expand

Kind = Literal["weights", "sampler_weights"]
_PATH = re.compile(r"(?:rlsys|tinker|mint)://([A-Za-z0-9][A-Za-z0-9._:-]*)/(weights|sampler_weights)/([^/]+)")


def path_of(model_id: str, kind: Kind, name: str) -> str:
    return f"rlsys://{model_id}/{kind}/{name}"


def given(path: str) -> str:
    """A saved state as its user names it. In a folder's path ``~``, variables and what it is relative to are those of
    the user's process, whichever process reads it.

    Raises:
        ConfigError: it is a path with a variable or a user that does not exist.
    """
    return path if "://" in path else str(Path(expand(path)).absolute())


def folder_of(root: Path, path: str) -> Path:
    """The folder that a path means, under `root` unless it is a folder already.

    Raises:
        CheckpointError: it is neither, or a name in it is no plain one.
    """
    if "://" not in path:
        return Path(path)
    match = _PATH.fullmatch(path)
    if match is None:
        raise CheckpointError(
            f"{path!r} is no saved state; wanted what save_state or save_weights_for_sampler returned "
            "(rlsys://<model id>/weights/<name> or .../sampler_weights/<name>), or a checkpoint folder"
        )
    return new_folder_of(root, *match.groups())


def new_folder_of(root: Path, model_id: str, kind: str, name: str) -> Path:
    """Where a state of that name is saved. Raises CheckpointError as `folder_of` does."""
    from rlsys.learner.adapter_checkpoint import checkpoint_path

    return checkpoint_path(root / model_id.replace(":", ".") / kind, name)
