"""Door onto the graders, and the one place that turns completions into text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.cluster.column_refs import split as parts_of
from rlsys.config import JobConfig
from rlsys.types import Array


class RewardActor:
    def __init__(self, config: JobConfig) -> None:
        self.config = config

    def start(self, base: Any) -> None:
        from actors.cluster.base_folder import local_folder
        from rlsys.grading.grader import Grader

        with local_folder(base) as folder:
            self.grading = Grader.start(self.config, folder)

    def problems(self, split: str) -> Any:
        return self.grading.problems[split]

    def task_facts(self) -> dict[str, float]:
        return dict(self.grading.metrics)

    def digest(self) -> str:
        return self.grading.problems["train"].digest

    def grade(self, split: str, *rollouts: Any) -> tuple[Array, Any]:
        from rlsys.rollouts import concatenate

        grades = self.grading.grade(split, concatenate(rollouts))
        return grades.rewards, (grades.metrics, grades.failure, grades.grade, grades.passed, grades.idle)

    def show(self, split: str, rows: int, firsts: Sequence[int], sizes: Sequence[int], *columns: Any) -> list[Any]:
        """`firsts`: what to add to each piece's numbers of completions to have those of the step."""
        import numpy as np

        from rlsys.rollouts import concatenate

        rollouts, rewards, datums, rows_of, logprobs = parts_of(sizes, columns)
        of_step = [numbers + first for numbers, first in zip(rows_of, firsts, strict=True)]
        whole, rewards_R = concatenate(rollouts), np.concatenate(rewards)
        return self.grading.show(split, rows, whole, rewards_R, datums, of_step, logprobs)

    def write_problems(self, run_dir: str) -> None:
        """The training problems' texts, beside what is told of them by number."""
        self.grading.write_problems(Path(run_dir))

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
        """Changes whenever a grade has come in."""
        return self.grading.pool.progress() if hasattr(self, "grading") else None

    def stop(self) -> None:
        """Also where `start` was never reached."""
        if hasattr(self, "grading"):
            self.grading.close()
