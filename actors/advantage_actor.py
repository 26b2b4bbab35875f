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
        from rlsys.advantages import to_datums
        from rlsys.rollouts import concatenate

        return to_datums(concatenate(rollouts), rewards, self.section, reference)
