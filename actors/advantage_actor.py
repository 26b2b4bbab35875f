"""Door onto the group advantages."""

from __future__ import annotations

from typing import Any

import ray

from rlsys.config import AdvantageSection
from rlsys.types import Array


class GroupAdvantageActor:
    def __init__(self, section: AdvantageSection) -> None:
        self.section = section

    @ray.method(num_returns=2)
    def centre(self, rewards: Array, reference: Array | None, *rollouts: Any) -> Any:
        from rlsys.advantages import group_outcomes, to_datums
        from rlsys.rollouts import concatenate

        whole = concatenate(rollouts)
        datums, facts = to_datums(whole, rewards, self.section, reference)
        return datums, (facts, group_outcomes(whole, rewards, self.section))

    def progress(self) -> None:
        """Nothing to tell: a call is one pass over arrays."""
