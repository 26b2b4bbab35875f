"""Waiting for actors: every wait has a limit, and what went wrong comes out as one readable error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlsys.errors import ActorFailedError, RlsysError, StalledError


def wait(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """The value behind one reference. `what` names who does what, for the message.

    Raises:
        RlsysError: the one that the actor raised, as it raised it.
        ActorFailedError: the actor died, or raised an error from outside rlsys; the message has its traceback.
        StalledError: no answer within the limit.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise StalledError(
            f"{what}: no answer within {timeout_s:.0f} s (run.stage_timeout_s, run.start_timeout_s)"
        ) from None
    except RayTaskError as error:
        raise _as_raised(error, what) from None
    except RayActorError as error:
        raise ActorFailedError(f"{what}: the actor is gone: {_first_line(error)}") from None
    except RayError as error:
        raise ActorFailedError(f"{what}: {type(error).__name__}: {_first_line(error)}") from None


def wait_all(refs: Sequence[ray.ObjectRef], timeout_s: float, what: Sequence[str]) -> list[Any]:
    """As ``wait``, for several at once: the first to fail is the one that is raised, in whichever order they stand."""
    names = dict(zip(refs, what, strict=True))
    pending = list(refs)
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=timeout_s, fetch_local=False)
        if not ready:
            waiting = ", ".join(names[ref] for ref in pending)
            raise StalledError(f"no answer within {timeout_s:.0f} s from: {waiting}")
        wait(ready[0], timeout_s, names[ready[0]])
    return list(ray.get(list(refs), timeout=timeout_s))


def _as_raised(error: RayTaskError, what: str) -> RlsysError:
    if isinstance(error.cause, RlsysError):
        return error.cause
    return ActorFailedError(f"{what}: {type(error.cause).__name__}: {error.cause}\n{str(error).rstrip()}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])
