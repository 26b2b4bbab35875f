"""Door onto the graders, and the one place that turns completions into text."""

from __future__ import annotations

from typing import Any

import ray

from rlsys.config import JobConfig
from rlsys.types import Array


class RewardActor:
    def __init__(self, config: JobConfig) -> None:
        self.config = config

    def start(self, base: Any) -> None:
        from actors.base_folder import local_folder
        from rlsys.grading import Grading

        with local_folder(base) as folder:
            self.grading = Grading.start(self.config, folder)

    def problems(self, split: str) -> Any:
        return self.grading.problems[split]

    @ray.method(num_returns=2)
    def grade(self, split: str, *rollouts: Any) -> tuple[Array, dict[str, float]]:
        from rlsys.rollouts import concatenate

        return self.grading.grade(split, concatenate(rollouts))

    def show(self, split: str, rows: int, rewards: Array, *rollouts: Any) -> list[Any]:
        from rlsys.rollouts import concatenate

        return self.grading.show(split, concatenate(rollouts), rewards, rows)

    @ray.method(concurrency_group="watch")
    def progress(self) -> Any:
        """Changes whenever a grade has come in."""
        return self.grading.pool.progress() if hasattr(self, "grading") else None

    def stop(self) -> None:
        """Also where `start` was never reached."""
        if hasattr(self, "grading"):
            self.grading.close()
