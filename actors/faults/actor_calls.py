"""Waits for results of actors with a time limit, and converts Ray's errors into those of rlsys/errors.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from rlsys.errors import ActorDiedError, ActorFailedError, DataLostError, RlsysError, StalledError
from rlsys.utils.gpu_errors import Role, advised

DEATHS = (RayActorError, NodeDiedError, WorkerCrashedError, LocalRayletDiedError, OutOfMemoryError)

_COLOUR = re.compile(r"\x1b\[\d*m")
# Ray's replacement for "Traceback (most recent call last):"; the last match belongs to the actor that failed first.
_HEADER = re.compile(r"ray::(?P<call>[\w.<>-]+)\(\) \(pid=(?P<pid>\d+), ip=(?P<ip>[^,)]+)(?:, actor_id=(?P<id>\w+))?")
_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+), in (?P<name>.+)')
_OURS = re.compile(r".*/((?:rlsys|actors)/.+)")
_FOREIGN = re.compile(r"/(site-packages|dist-packages|lib/python3[^/]*)/|^python/ray/|^<")
_CAUSE_CHARACTERS = 800  # of the cause of a failed runtime environment
_EXCEPTION_CHARACTERS = 1000  # last characters of a traceback, which hold the message of its exception
_ROLES: tuple[Role, ...] = ("learner", "sampler")
_RAISED = re.compile(r"^[\w.]+(?:Error|Exception|Exit|Interrupt|Warning)\b.*")


@dataclass(frozen=True, slots=True)
class Origin:
    """Source of a failure, parsed from Ray's error text; the exception object no longer holds it."""

    name: str  # class and process of the actor; empty if it is the actor that was called
    actor_id: str  # hex; empty for a task
    place: str  # "rlsys/learner/policy.py:88 in step"; empty if Ray's text has no frames
    block: str  # the part of the text with the traceback of the actor that failed first


def wait(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """Get the value of one reference. `what` names the actor and its work, for error messages. Any: a handle's methods
    have no types.

    Raises:
        RlsysError: the error that the actor raised, unchanged.
        ActorDiedError, DataLostError: the actor is dead, or an argument of its call is lost.
        ActorFailedError: the actor raised an error from outside rlsys.
        StalledError: no result within the limit.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise StalledError(f"{what}: no answer within {timeout_s:.0f} s") from None
    except RayError as error:
        raise as_raised(error, what) from None


def as_raised(error: BaseException, who: str, names: Mapping[str, str] | None = None) -> RlsysError:
    """Convert a Ray error into an RlsysError with a one-line message. For an error from outside rlsys the traceback is
    added as a note.

    `who`: the actor whose result was awaited. If another actor failed first, the message names that actor: by `names`
    (actor id -> name), or else by class and process. Only the death of `who` itself becomes an ActorDiedError.
    """
    if isinstance(error, RlsysError) and not isinstance(error, RayError):
        return error
    names = names or {}
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RlsysError):
        return cause
    text = _COLOUR.sub("", str(error))
    if isinstance(cause, ObjectLostError):
        return DataLostError(f"{who}: its input is lost with the node or actor that held it: {_first_line(cause)}")
    if isinstance(cause, RayActorError) and getattr(cause, "_actor_init_failed", False):
        return _failed(_origin(str(cause.error_msg)), _last_raised(str(cause.error_msg)), who, names)
    if isinstance(cause, DEATHS) and isinstance(error, RayTaskError):  # alive, but the actor that makes its input died
        gone = names.get(getattr(cause, "actor_id", None) or "", "another actor")
        return DataLostError(f"{who}: its input is lost with {gone}: {_ending(cause)}")
    if isinstance(cause, DEATHS):
        return ActorDiedError(f"{who}: {_ending(cause)}")
    if not isinstance(error, RayTaskError):
        reason = _environment_failure(text) if isinstance(error, RuntimeEnvSetupError) else _first_line(error)
        return ActorFailedError(f"{who}: {type(error).__name__}: {reason}")
    return _failed(_origin(text), f"{type(cause).__name__}: {_first_line(cause)}", who, names)


def _failed(origin: Origin, raised: str, who: str, names: Mapping[str, str]) -> ActorFailedError:
    culprit = names.get(origin.actor_id) or (origin.name if origin.name else who)
    culprit, needed = (culprit, f", needed by {who}") if culprit != who else (who, "")
    place = f" ({origin.place})" if origin.place else ""
    failure = ActorFailedError(f"{culprit}: {_advised(raised, origin.block, culprit)}{place}{needed}")
    failure.add_note(origin.block)
    return failure


def _advised(raised: str, block: str, culprit: str) -> str:
    """Append advice for known errors of CUDA, NCCL and vLLM."""
    role = next((role for role in _ROLES if culprit.lower().startswith(role)), None)
    return raised if role is None else advised(raised, f"{raised}\n{block[-_EXCEPTION_CHARACTERS:]}", role)


def _origin(text: str) -> Origin:
    headers = list(_HEADER.finditer(_COLOUR.sub("", text)))
    if not headers:
        return Origin("", "", _place(text), text)
    last = headers[-1]
    block = _COLOUR.sub("", text)[last.start() :]
    same = last["id"] == headers[0]["id"]  # the actor that was called, whose name the caller knows
    kind = last["call"].partition(".")[0]
    name = "" if same else f"{kind} (pid {last['pid']} on {last['ip']})"
    return Origin(name, last["id"] or "", _place(block), block)


def _place(block: str) -> str:
    """The last frame in code of rlsys or of the user; without such a frame the last one."""
    frames = list(_FRAME.finditer(block))
    if not frames:
        return ""
    known = [frame for frame in frames if _OURS.match(frame["path"]) or not _FOREIGN.search(frame["path"])]
    frame = (known or frames)[-1]
    path = _OURS.sub(r"\1", frame["path"])
    return f"{path}:{frame['line']} in {frame['name']}"


def _last_raised(text: str) -> str:
    lines = [line for line in text.splitlines() if _RAISED.match(line)]
    return lines[-1] if lines else "its constructor failed"


def _ending(error: RayError) -> str:
    """Ray's reason for the death of an actor, without the text that Ray adds to every death."""
    text = str(error)
    process = re.search(r"pid: (\d+)", text), re.search(r"\bip: (\S+)", text)
    where = f" (pid {process[0][1]} on {process[1][1]})" if process[0] and process[1] else ""
    if "connection error code 2" in text:
        return f"its process is gone{where}: killed, out of memory, or crashed"
    reason = text.rpartition("The actor is dead because ")[2].partition(" Some common causes")[0]
    reason = reason.replace("Worker exit type: ", "").replace("Worker exit detail: ", "")
    return f"it is gone{where}: {' '.join(reason.split())}"


def _environment_failure(text: str) -> str:
    """The cause of a failed runtime environment: Ray writes it, often with a traceback, below a general first line."""
    raised = [line.strip() for line in text.splitlines() if _RAISED.match(line.strip())]
    cause = raised[-1] if raised else " ".join(text.split())
    return cause if len(cause) <= _CAUSE_CHARACTERS else f"{cause[:_CAUSE_CHARACTERS]}..."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
