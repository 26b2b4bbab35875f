"""Builds the update of each version that samplers load, with the canary by which a sampler proves what it serves."""

from __future__ import annotations

import numpy as np

from rlsys.errors import DivergedError
from rlsys.types import Array
from rlsys.weight_sync.canary import Canary, StartupProbe
from rlsys.weight_sync.update import WeightUpdate


class AdapterPublisher:
    """Publishes versions of one learner's runs, and keeps the canary under each run's version published last."""

    def __init__(self, canary: Canary) -> None:
        self._canary = canary
        self._published: dict[str, Array] = {}  # run id -> (C - 1,) nats of the short canary

    @property
    def bound(self) -> float:
        """Mean nats by which a sampler of the version published last may differ."""
        return self._canary.bound

    def publish(self, run_id: str, last_update: str, advice: str) -> WeightUpdate:
        """The run's adapter now, with the canary under it and under the version published before. The first version is
        compared with the base.

        `last_update` and `advice` go into the error: what changed the run last, and what the user can do.

        Raises:
            DivergedError: log-probabilities are not finite. Samplers keep the version before.
        """
        current = self._canary.score(run_id)
        if not np.isfinite(current).all():
            raise DivergedError(
                f"run {run_id!r} gives {np.count_nonzero(~np.isfinite(current))} of {len(current)} canary tokens no "
                f"finite log-probability; it {last_update}. No sampler received this version. {advice}"
            )
        update = self._canary.update(run_id, current, self._published.get(run_id, self._canary.base))
        self._published[run_id] = current
        return update

    def reset(self, run_id: str) -> None:
        """Compare the run's next version with the base, as the first one. Use when the run is restored or dropped."""
        self._published.pop(run_id, None)

    def probe(self, run_id: str) -> StartupProbe:
        """The base at early and late positions, and an adapter of the run's shape with a large B, which a sampler whose
        forward pass ignores adapters cannot reproduce."""
        return self._canary.startup(run_id)
