"""Tells the actors of a deployment, every minute, that this process is alive."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from rlsys.service.leases import RENEW_S


class LeaseRenewal:
    """A daemon thread, which ends with the process, with Ray's connection, or with `stop`."""

    def __init__(self, actors: Sequence[ActorHandle], holder: str) -> None:
        self._actors, self._holder = list(actors), holder
        self._stopped = threading.Event()
        threading.Thread(target=self._renew, name="rlsys-lease", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _renew(self) -> None:
        while ray.is_initialized():
            try:
                for actor in self._actors:
                    actor.renew.remote(self._holder)
            except (RayError, RuntimeError):  # the connection ends at this moment
                return
            if self._stopped.wait(RENEW_S):
                return
