"""TensorBoard's copy of metrics.jsonl, under ``tensorboard/rl`` and ``tensorboard/sft`` of the run directory.

Two folders, since both stages count their steps from 0. A repeated step hides its first values: a new event file
declares the step from which TensorBoard ignores the earlier files of its folder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.errors import ConfigError
from rlsys.run_state.jsonl import Record, metrics_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
STAGES = ("rl", "sft")


class TensorBoardWriter:
    """Event files of one run; values are in the file when a call returns."""

    def __init__(self, run_dir: Path, config: str, kept: Sequence[Record]) -> None:
        """Continue after `kept`, the lines of metrics.jsonl; `config` is shown as text.

        Raises:
            ConfigError: the package tensorboard is not installed.
        """
        self._folder = run_dir / FOLDER
        is_new = not self._folder.exists()
        self._writers = {stage: self._open(stage, None if is_new else _next_step(kept, stage)) for stage in STAGES}
        if is_new:
            indented = "".join(f"    {line}\n" for line in config.splitlines())  # Markdown's code block
            self._writers["rl"].add_text("config", indented, 0)
            for record in kept:
                self._add(record)
        self._flush()

    def log(self, record: Record) -> None:
        """A line of metrics.jsonl."""
        self._add(record)
        self._writers[record["stage"]].flush()

    def roll_back(self, step: int) -> None:
        """Hide the RL steps after `step`, which are repeated."""
        self._writers["rl"].close()
        self._writers["rl"] = self._open("rl", step + 1)
        self._flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _add(self, record: Record) -> None:
        writer = self._writers[record["stage"]]
        for name, value in metrics_of(record).items():
            writer.add_scalar(name, float(value), record["step"], walltime=record["time"])

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def _open(self, stage: str, purge_step: int | None) -> SummaryWriter:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"tracking.tensorboard: found no package tensorboard ({error}); pip install tensorboard, or set "
                "tracking.tensorboard=false"
            ) from error
        _let_a_second_begin(self._folder / stage)
        return SummaryWriter(str(self._folder / stage), purge_step=purge_step)


def _let_a_second_begin(folder: Path) -> None:
    """TensorBoard reads a folder's files in the order of their names, which begin with the second they were made in."""
    newest = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    time.sleep(min(1.0, max(0.0, newest + 1 - time.time())))


def _next_step(kept: Sequence[Record], stage: str) -> int:
    return max((record["step"] + 1 for record in kept if record["stage"] == stage), default=0)
