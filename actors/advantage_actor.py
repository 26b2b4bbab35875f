"""Actor around the group advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.cluster.column_refs import unpack_columns
from rlsys.config import RlSection
from rlsys.metrics import Metrics
from rlsys.types import Array

if TYPE_CHECKING:
    from rlsys.datums import DatumBatch
    from rlsys.rollouts import Rollouts


@dataclass(frozen=True, slots=True)
class AdvantageRequest:
    num_minibatches: int
    lengths: tuple[int, ...]  # of the columns beside the request: rollouts, rewards, reference


class GroupAdvantageActor:
    def __init__(self, section: RlSection) -> None:
        self.section = section

    def compute_advantages(
        self, request: AdvantageRequest, *columns: Rollouts | Array
    ) -> tuple[DatumBatch | Array | tuple[Metrics, Array], ...]:
        """Datums of each minibatch, the completions that they come from, and (metrics, outcomes)."""
        import numpy as np

        from rlsys.advantages import to_minibatches
        from rlsys.rollouts import concatenate

        rollouts, rewards, reference = unpack_columns(request.lengths, columns)
        logprobs = np.concatenate(reference) if reference else None
        batches, rows, metrics, outcomes = to_minibatches(
            concatenate(rollouts), np.concatenate(rewards), self.section, request.num_minibatches, logprobs
        )
        return *batches, *rows, (metrics, outcomes)

    def progress(self) -> None:
        """No progress within a call, which is one pass over arrays."""
