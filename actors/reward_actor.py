"""Actor that decodes and grades completions, and prepares them for reports and recordings."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from actors.cluster.column_refs import unpack_columns
from actors.forking.client import why_not_forked
from rlsys.config import JobConfig
from rlsys.metrics import Metrics
from rlsys.types import Array

if TYPE_CHECKING:
    from actors.cluster.base_folder import Base
    from rlsys.data.problems import ProblemSet
    from rlsys.datums import DatumBatch
    from rlsys.rewards.grader import Grader
    from rlsys.rewards.rollout_samples import RolloutSample
    from rlsys.rollouts import Rollouts


@dataclass(frozen=True, slots=True)
class ShowRequest:
    """Completions of a step to decode for the report."""

    split: str
    count: int
    first_rows: tuple[
        int, ...
    ]  # of each minibatch: added to its row numbers, it gives the completion number within the step
    lengths: tuple[int, ...]  # references per column: rollouts, rewards, datums, rows, logprobs of the learner


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """A step's rollouts for `rlsys replay`."""

    run_dir: str
    step: int
    version: int  # of the learner when the step began
    num_minibatches: int
    lengths: tuple[int, ...]  # references per column: rollouts, rewards, reference log-probabilities


class RewardActor:
    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.started: Grader | None = None

    def start(self, base: Base) -> str:
        """Returns `why_not_forked`."""
        from actors.cluster.base_folder import local_folder
        from rlsys.rewards.grader import Grader

        # Its path: multiprocessing has each grader process run the main module, which here is Ray's worker program.
        vars(sys.modules["__main__"]).pop("__file__", None)
        with local_folder(base) as folder:
            self.started = Grader.start(self.config, folder)
        return why_not_forked()

    def problems(self, split: str) -> ProblemSet:
        return self._grader.problems[split]

    def task_facts(self) -> dict[str, float]:
        return dict(self._grader.metrics)

    def digest(self) -> str:
        return self._grader.problems["train"].digest

    def grade(self, split: str, *rollouts: Rollouts) -> tuple[Array, tuple[Metrics, str, Array, Array, Array]]:
        """Rewards, and (metrics, first failure, grade, passed and idle of each group) as `RewardsRef` has them."""
        from rlsys.rollouts import concatenate

        grades = self._grader.grade(split, concatenate(rollouts))
        return grades.rewards, (grades.metrics, grades.failure, grades.grade, grades.passed, grades.idle)

    def show(self, request: ShowRequest, *columns: Rollouts | DatumBatch | Array) -> list[RolloutSample]:
        import numpy as np

        from rlsys.rewards.rollout_samples import LearnedBatch
        from rlsys.rollouts import concatenate

        rollouts, rewards, datums, rows_of, logprobs = unpack_columns(request.lengths, columns)
        of_step = [rows + first for rows, first in zip(rows_of, request.first_rows, strict=True)]
        return self._grader.show(
            request.split,
            request.count,
            concatenate(rollouts),
            np.concatenate(rewards),
            LearnedBatch(datums, of_step, logprobs) if datums else None,
        )

    def write_problems(self, run_dir: str) -> None:
        """Write the texts of the training problems; metrics and rollouts name problems by number."""
        self._grader.write_problems(Path(run_dir))

    def record(self, request: RecordRequest, *columns: Rollouts | Array) -> None:
        import numpy as np

        from rlsys.rollouts import concatenate
        from rlsys.run_state.saved_rollouts import SavedStep, save_step

        rollouts, rewards, reference = unpack_columns(request.lengths, columns)
        logprobs = np.concatenate(reference) if reference else None
        saved = SavedStep(
            request.step,
            request.version,
            request.num_minibatches,
            concatenate(rollouts),
            np.concatenate(rewards),
            logprobs,
        )
        save_step(Path(request.run_dir), saved, self.config.tracking.rollout_steps)

    @ray.method(concurrency_group="watch")
    def progress(self) -> int | None:
        """Changes with every grade; None before `start` is done."""
        return None if self.started is None else self.started.pool.progress()

    def stop(self) -> None:
        """Stop the grader processes, if they were started."""
        if self.started is not None:
            self.started.close()

    @property
    def _grader(self) -> Grader:
        assert self.started is not None, "start comes first"
        return self.started
