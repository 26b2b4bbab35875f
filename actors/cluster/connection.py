"""Tells one connection of this process to Ray from the next."""

from __future__ import annotations

import ray
from ray._private import worker as ray_worker


def connection() -> object | None:
    """The present connection to Ray; None without one. Threads that can outlive a connection compare it: without one,
    most of Ray's functions start Ray or join the cluster at RAY_ADDRESS, and with another one they reach other actors.
    """
    return ray_worker._global_node if ray.is_initialized() else None
