"""Door onto the group advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.cluster.column_refs import split
from rlsys.config import RlSection


class GroupAdvantageActor:
    def __init__(self, section: RlSection) -> None:
        self.section = section

    def compute_advantages(self, num_minibatches: int, sizes: Sequence[int], *columns: Any) -> Any:
        """The pieces' datums, whose completions they are, and (facts, outcomes)."""
        import numpy as np

        from rlsys.advantages import to_minibatches
        from rlsys.rollouts import concatenate

        rollouts, rewards, reference = split(sizes, columns)
        logprobs = np.concatenate(reference) if reference else None
        batches, rows, metrics, outcomes = to_minibatches(
            concatenate(rollouts), np.concatenate(rewards), self.section, num_minibatches, logprobs
        )
        return *batches, *rows, (metrics, outcomes)

    def progress(self) -> None:
        """Nothing to tell: a call is one pass over arrays."""
