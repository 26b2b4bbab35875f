"""Actor around the graders: the only place that turns completions into text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.cluster.column_refs import split as parts_of
from rlsys.config import JobConfig
from rlsys.types import Array

if TYPE_CHECKING:
    from rlsys.data.problems import ProblemSet
    from rlsys.grading.grader import Grader


class RewardActor:
    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.started: Grader | None = None

    def start(self, base: Any) -> None:
        from actors.cluster.base_folder import local_folder
        from rlsys.grading.grader import Grader

        with local_folder(base) as folder:
            self.started = Grader.start(self.config, folder)

    def problems(self, split: str) -> ProblemSet:
        return self._grader.problems[split]

    def task_facts(self) -> dict[str, float]:
        return dict(self._grader.metrics)

    def digest(self) -> str:
        return self._grader.problems["train"].digest

    def grade(self, split: str, *rollouts: Any) -> tuple[Array, Any]:
        from rlsys.rollouts import concatenate

        grades = self._grader.grade(split, concatenate(rollouts))
        return grades.rewards, (grades.metrics, grades.failure, grades.grade, grades.passed, grades.idle)

    def show(self, split: str, rows: int, firsts: Sequence[int], sizes: Sequence[int], *columns: Any) -> list[Any]:
        """`firsts`: what to add to each piece's numbers of completions to have those of the step."""
        import numpy as np

        from rlsys.rollouts import concatenate

        rollouts, rewards, datums, rows_of, logprobs = parts_of(sizes, columns)
        of_step = [numbers + first for numbers, first in zip(rows_of, firsts, strict=True)]
        whole, rewards_R = concatenate(rollouts), np.concatenate(rewards)
        return self._grader.show(split, rows, whole, rewards_R, datums, of_step, logprobs)

    def write_problems(self, run_dir: str) -> None:
        """Write the texts of the training problems; metrics and rollouts name problems by number."""
        self._grader.write_problems(Path(run_dir))

    def record(self, run_dir: str, step: int, version: int, pieces: int, sizes: Sequence[int], *columns: Any) -> None:
        import numpy as np

        from rlsys.rollouts import concatenate
        from rlsys.run_state.saved_rollouts import SavedStep, save_step

        rollouts, rewards, reference = parts_of(sizes, columns)
        logprobs = np.concatenate(reference) if reference else None
        recorded = SavedStep(step, version, pieces, concatenate(rollouts), np.concatenate(rewards), logprobs)
        save_step(Path(run_dir), recorded, self.config.tracking.rollout_steps)

    @ray.method(concurrency_group="watch")
    def progress(self) -> Any:
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
