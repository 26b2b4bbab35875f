"""Tells one connection of this process to Ray from the next, and keeps it for a thread that uses it.

Threads can outlive a connection. Without one, many of Ray's functions, and every call of an actor, start Ray or join
the cluster at RAY_ADDRESS; with another one they reach other actors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray
from ray._private import worker as ray_worker

from rlsys.errors import ClusterError

LEFT = "this process has left the Ray cluster of the deployment"
PATIENCE_S = 10.0  # of the end of a connection, for threads that use it


@dataclass
class _Uses:
    """Guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    users: int = 0
    ending: bool = False


_uses = _Uses()


def connection() -> object | None:
    """The present connection to Ray; None without one."""
    return ray_worker._global_node if ray.is_initialized() else None


@contextmanager
def kept(expected: object | None) -> Iterator[None]:
    """`disconnect` waits for the end of the block, which is short. (The user's own `ray.shutdown` does not.)

    Raises:
        ClusterError: the present connection is not the expected one, or it is ending.
    """
    with _uses.changed:
        if _uses.ending or connection() is not expected:
            raise ClusterError(LEFT)
        _uses.users += 1
    try:
        yield
    finally:
        with _uses.changed:
            _uses.users -= 1
            _uses.changed.notify_all()


def disconnect() -> None:
    """`ray.shutdown`, once no thread keeps the connection, or after PATIENCE_S."""
    with _uses.changed:
        _uses.ending = True
        _uses.changed.wait_for(lambda: not _uses.users, PATIENCE_S)
    try:
        ray.shutdown()
    finally:
        with _uses.changed:
            _uses.ending = False
