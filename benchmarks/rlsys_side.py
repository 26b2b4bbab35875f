"""The rlsys side of benchmarks/grpo_step.py: a job that makes one step of its loop per turn.

    python -m benchmarks.rlsys_side section.key=value ...

The job calls its Progress at the end of every step; there it blocks until the next turn.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from actors.job import train
from benchmarks.sides import Turn
from rlsys.config import parse_config
from rlsys.tracking.progress import Progress


class Turns(Progress):
    def __init__(self, turn: Turn, steps: int) -> None:
        super().__init__()
        self._turn, self._steps = turn, steps

    def update(
        self,
        step: int,
        *,
        reward: float | None = None,
        tokens_per_s: float | None = None,
        accuracy: float | None = None,
        loss: float | None = None,
        times: Mapping[str, float] | None = None,
    ) -> None:
        super().update(step, reward=reward, tokens_per_s=tokens_per_s, accuracy=accuracy, loss=loss, times=times)
        if step and times is None:  # the evaluation after the last step
            return
        self._turn.over(**{f"{name}_s": seconds for name, seconds in (times or {}).items()})
        if step < self._steps:
            self._turn.wait()


def main() -> None:
    config = parse_config("{}", sys.argv[1:], source="benchmark")
    train(config, Turns(Turn(), config.rl.steps))


if __name__ == "__main__":
    main()
