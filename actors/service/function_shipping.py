"""Serializes a user's function so that another node can load it."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ray import cloudpickle

from rlsys.errors import LossError


def ship(fn: Callable[..., object]) -> bytes:
    """Pickle a function: by reference if its package is installed, with its code if it is from the user's files.

    Raises:
        LossError: an object that the function uses cannot be pickled; the message names it.
    """
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    with _by_value(module):
        try:
            shipped: bytes = cloudpickle.dumps(fn)
        except Exception as error:  # pickling can raise any error of the object's code
            name = getattr(fn, "__qualname__", repr(fn))
            raise LossError(
                f"custom loss {name!r} cannot be shipped to the learner: {_culprit(fn)} cannot be pickled ({error}). "
                "Create it inside the function, or pass where='caller' to run the function in this process"
            ) from error
    return shipped


@contextmanager
def _by_value(module: ModuleType | None) -> Iterator[None]:
    if module is None or not _is_users(module) or module.__name__ in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _is_users(module: ModuleType) -> bool:
    """Whether the module is a file outside of installed packages, which the learner's node may lack."""
    file = getattr(module, "__file__", None)
    if file is None or module.__name__ == "__main__" or module.__name__.split(".")[0] in ("rlsys", "actors"):
        return False
    installed = [sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not any(Path(file).is_relative_to(folder) for folder in installed)


def _culprit(fn: Callable[..., object]) -> str:
    """Description of the closure variable, global or default argument that cannot be pickled."""
    function = inspect.unwrap(fn) if inspect.isfunction(fn) else getattr(fn, "__call__", fn)  # noqa: B004
    try:
        names = inspect.getclosurevars(function)
    except TypeError:
        return repr(fn)
    defaults = dict(enumerate(getattr(function, "__defaults__", None) or ()))
    used: list[tuple[str, Mapping[str, object] | Mapping[int, object]]] = [
        ("closure variable", names.nonlocals),
        ("global", names.globals),
        ("default argument", defaults),
    ]
    for kind, variables in used:
        for name, value in variables.items():
            try:
                cloudpickle.dumps(value)
            except Exception:  # this variable is the cause
                return f"its {kind} {name!r}, a {type(value).__name__},"
    return "an object that it uses"
