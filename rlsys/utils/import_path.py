"""Imports what a user names by its path, 'package.module:name'."""

from __future__ import annotations

import importlib

from rlsys.errors import ConfigError, did_you_mean

# Modules and packages that users' configurations, rewards and tasks name or import, by the names that they had before.
MOVED = {
    "rlsys.problems": "rlsys.data.problems",
    "rlsys.rewards.extraction": "rlsys.math_grading.extraction",
    "rlsys.rewards.math": "rlsys.math_grading",
    "rlsys.rewards.math_answers": "rlsys.math_grading.answers",
    "rlsys.tasks.rows": "rlsys.data.rows",
}


def import_by_path(path: str, key: str, wanted: str) -> object:
    """The function or class that `path` names; `key` is the job's key, `wanted` describes a right value.

    Raises:
        ConfigError: the path has another form, the module cannot be imported, or lacks the name.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{key}: found {path!r}; wanted {wanted}")
    try:
        found: object = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything, and a script may end itself
        moved = _moved(error.name or "", module_name) if isinstance(error, ModuleNotFoundError) else None
        if moved is not None:
            old, new = moved
            raise ConfigError(f"{key}: {path!r}: the module {old} is now {new}; use that name") from error
        raise ConfigError(
            f"{key}: {path!r}: importing {module_name} raised {type(error).__name__}: {error}; "
            "it must be importable on the node that uses it (install it, or put its folder on PYTHONPATH)"
        ) from error
    inside = module_name
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{key}: {path!r}: {inside} has no {part!r}{did_you_mean(part, dir(found))}")
        found, inside = getattr(found, part), f"{inside}.{part}"
    return found


def _moved(missing: str, asked: str) -> tuple[str, str] | None:
    """(old, new) name of a module that has moved. `missing`: the module that Python did not find, `asked` itself or a
    package above it, or one that the user's module imports."""
    name = asked if asked.startswith(f"{missing}.") else missing
    for old, new in MOVED.items():
        if name == old or name.startswith(f"{old}."):
            return name, new + name.removeprefix(old)
    return None
