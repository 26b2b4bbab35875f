"""A user's function as bytes that another node can load."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ray import cloudpickle

from rlsys.errors import LossError


def ship(fn: Callable[..., Any]) -> bytes:
    """Functions of installed packages travel by name, those of the user's own files with their code.

    Raises:
        LossError: something that the function uses cannot travel; it is named.
    """
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    with _by_value(module):
        try:
            shipped: bytes = cloudpickle.dumps(fn)
        except Exception as error:  # pickling fails with whatever the object's own code raises
            name = getattr(fn, "__qualname__", repr(fn))
            raise LossError(
                f"custom loss {name!r} cannot be shipped to the learner: {_culprit(fn)} cannot be pickled ({error}). "
                "Make it inside the function, or pass where='caller' to run the function here"
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
    """A file that is not installed, which the learner's node need not have."""
    file = getattr(module, "__file__", None)
    if file is None or module.__name__ == "__main__" or module.__name__.split(".")[0] in ("rlsys", "actors"):
        return False
    installed = [sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not any(Path(file).is_relative_to(folder) for folder in installed)


def _culprit(fn: Callable[..., Any]) -> str:
    """The variable that the function closes over, or the global that it reads, which does not pickle."""
    function = inspect.unwrap(fn) if inspect.isfunction(fn) else getattr(fn, "__call__", fn)  # noqa: B004
    try:
        names = inspect.getclosurevars(function)
    except TypeError:
        return repr(fn)
    defaults = dict(enumerate(getattr(function, "__defaults__", None) or ()))
    used: list[tuple[str, Mapping[Any, Any]]] = [
        ("closure variable", names.nonlocals),
        ("global", names.globals),
        ("default argument", defaults),
    ]
    for kind, variables in used:
        for name, value in variables.items():
            try:
                cloudpickle.dumps(value)
            except Exception:  # the one that is looked for
                return f"its {kind} {name!r}, a {type(value).__name__},"
    return "what it refers to"
