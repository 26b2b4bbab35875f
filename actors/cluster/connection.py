"""Tells one connection of this process to Ray from the next, and keeps it for a thread that uses it.

Threads can outlive a connection. Without one, many of Ray's functions start Ray or join the cluster at RAY_ADDRESS, and
with another one they reach other actors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import worker as ray_worker

from rlsys.errors import ClusterError

LEFT = "this process has left the Ray cluster of the deployment"
PATIENCE_S = 10.0  # of the end of a connection, for threads that use it
_used = threading.Lock()


def connection() -> object | None:
    """The present connection to Ray; None without one."""
    return ray_worker._global_node if ray.is_initialized() else None


@contextmanager
def kept(expected: object | None) -> Iterator[None]:
    """The connection does not end within the block, which is short and in a thread of its own.

    Raises:
        ClusterError: the present connection is not the expected one.
    """
    with _used:
        if connection() is not expected:
            raise ClusterError(LEFT)
        yield


def disconnect() -> None:
    """`ray.shutdown`, once no thread keeps the connection."""
    free = _used.acquire(timeout=PATIENCE_S)
    try:
        ray.shutdown()
    finally:
        if free:
            _used.release()
