"""Exceptions of a host process, raised again in its actor with their type, message and cause."""

from __future__ import annotations

import pickle
import sys
import traceback
from dataclasses import dataclass

from rlsys.errors import RlsysError


@dataclass(frozen=True, slots=True)
class Raised:
    pickled: bytes | None  # None: of a library, which the actor would have to import, or nothing that pickle restores
    type_name: str
    message: str
    traceback: str
    cause: Raised | None


class LibraryError(Exception):
    """Base of the stand-ins for exceptions of libraries; a stand-in has the name and message of the exception."""


def pack(error: BaseException) -> Raised:
    cause = None if error.__cause__ is None else pack(error.__cause__)
    text = "".join(traceback.format_exception(error))
    return Raised(_pickled(error), type(error).__name__, str(error), text, cause)


def unpack(raised: Raised) -> BaseException:
    """The exception. One from outside rlsys has the host's traceback as a note: it comes last in a printed traceback,
    where actors.faults.actor_calls looks for the place of the failure."""
    error: BaseException = (
        type(raised.type_name, (LibraryError,), {})(raised.message)
        if raised.pickled is None
        else pickle.loads(raised.pickled)
    )
    if raised.cause is not None:
        error.__cause__ = unpack(raised.cause)
    if not isinstance(error, RlsysError):
        error.add_note(raised.traceback)
    return error


def _pickled(error: BaseException) -> bytes | None:
    package = type(error).__module__.partition(".")[0]
    if package != "rlsys" and package not in sys.stdlib_module_names:
        return None
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # some exceptions are pickled and cannot be restored
    except Exception:  # of __reduce__ and constructors, which may raise any type
        return None
    return pickled
