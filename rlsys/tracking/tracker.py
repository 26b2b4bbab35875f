"""Records a run: files (rlsys.run_state.jsonl) always, wandb and TensorBoard beside them. docs/metrics.md lists all.

The files are the record; a call returns when they are on disk. On resume they are cut back to the checkpoint's step,
and wandb (wandb_run.py) gets their lines again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rlsys.config import TrackingSection, yaml_text
from rlsys.errors import CheckpointError
from rlsys.run_state.jsonl import (
    CONFIG,
    ENVIRONMENT,
    GROUPS,
    METRICS,
    RECORD_KEYS,
    ROLLOUTS,
    GroupsRow,
    Note,
    Record,
    RolloutRow,
    cut_lines,
    open_to_append,
    rollout_of,
    write_line,
)
from rlsys.tracking.system_metrics import environment
from rlsys.tracking.tensorboard import TensorBoardWriter
from rlsys.tracking.wandb_run import CONNECT_TIMEOUT_S, WandbRun
from rlsys.utils.atomic_files import replace_file


class Tracker:
    """Records one run. A context manager: leaving it on an error closes wandb with exit code 1 (130 for Ctrl-C)."""

    def __init__(
        self,
        run_dir: Path,
        section: TrackingSection,
        run_name: str,
        config: Mapping[str, object],
        note: Note = print,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        *,
        wandb_id: str | None = None,
        resume_from: int | None = None,
        keep_supervised: bool = False,
    ) -> None:
        """`note` takes sentences for the user, from any thread; `config` is written to config.yaml and to wandb.

        Metrics and rollouts of RL steps after `resume_from` are removed, all of them when it is None; those of the
        supervised stage too, unless `keep_supervised`. A `wandb_id` that exists continues that wandb run.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        found_environment = environment()
        config_text = yaml_text.dump(config)
        replace_file(run_dir / CONFIG, config_text.encode())
        replace_file(run_dir / ENVIRONMENT, (json.dumps(found_environment, indent=2) + "\n").encode())
        self._run_dir = run_dir
        self._note = note
        self._at: tuple[str, int] | None = None  # (stage, step) of the row
        self._row = -1
        self._rows: list[RolloutRow] = []
        self._files: dict[str, TextIO] = {}  # by name, open to append
        kept = self._cut(-1 if resume_from is None else resume_from, keep_supervised)
        self._section = section
        self._board = TensorBoardWriter(run_dir, config_text, kept) if section.tensorboard else None
        self._wandb: WandbRun | None = None
        if section.wandb == "disabled":
            note("wandb: off (tracking.wandb: disabled)")
        else:
            whole_config = {**config, "environment": found_environment}
            self._wandb = WandbRun(run_dir, section, run_name, wandb_id, whole_config, note, connect_timeout_s)
            self._wandb.repeat(kept, self._rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step. Names of the supervised stage begin with ``sft/``; its steps count separately.

        Of two values with the same name and step the later one counts.
        """
        supervised = {name.startswith("sft/") for name in metrics}
        assert len(supervised) == 1, f"one call logs metrics of one stage, and at least one metric: {sorted(metrics)}"
        assert not set(metrics) & set(RECORD_KEYS), f"{RECORD_KEYS} are not metrics: {sorted(metrics)}"
        stage = "sft" if supervised.pop() else "rl"
        plain = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        if self._at != (stage, int(step)):
            self._at = (stage, int(step))
            self._row += 1
        record = {"step": int(step), "time": time.time(), "stage": stage, "row": self._row} | plain
        write_line(self._files[METRICS], record)
        if self._board:
            self._board.log(record)
        if self._wandb:
            self._wandb.log(record)

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Record completions; in wandb they are the table `rollouts` of this step."""
        if not rows:
            return
        for row in rows:
            write_line(self._files[ROLLOUTS], asdict(row), sync=row is rows[-1])
        self._rows.extend(map(_without_tokens, rows))
        if self._wandb:
            self._wandb.table(self._row, int(step), rows)

    def groups(self, step: int, problems: Sequence[int], solved: Sequence[float], grades: Sequence[float] = ()) -> None:
        """Record the outcome of a step's groups: problem id, share solved and mean grade of each."""
        assert len(problems) == len(solved), f"{len(problems)} problems and {len(solved)} shares"
        row = GroupsRow(int(step), [int(problem) for problem in problems], [*map(float, solved)], [*map(float, grades)])
        write_line(self._files[GROUPS], asdict(row))

    def roll_back(self, step: int) -> None:
        """Remove the records of RL steps after `step` (-1: of all RL steps), which will be repeated."""
        self._close_files()
        self._cut(step, keep_supervised=True)
        if self._board:
            self._board.roll_back(step)

    def _cut(self, step: int, keep_supervised: bool) -> Sequence[Record]:
        """Cut the files back, open them to append, and set the row number. Returns the lines of metrics.jsonl."""

        def keeps(record: Record) -> bool:
            return keep_supervised if record.get("stage") == "sft" else bool(record["step"] <= step)

        records = cut_lines(self._run_dir / METRICS, keeps, self._note)
        rollouts = cut_lines(self._run_dir / ROLLOUTS, keeps, self._note)
        self._rows = [_without_tokens(rollout_of(line)) for line in rollouts]
        cut_lines(self._run_dir / GROUPS, keeps, self._note)
        last = max(records, key=lambda record: record["row"], default=None)
        self._at = (last["stage"], last["step"]) if last else None
        self._row = last["row"] if last else -1
        self._files = {name: open_to_append(self._run_dir / name) for name in (METRICS, ROLLOUTS, GROUPS)}
        return records

    def _close_files(self) -> None:
        """Close all files, even if closing one of them fails on a full disk.

        Raises:
            OSError: the last write to a file is not on disk.
        """
        with contextlib.ExitStack() as closing:
            for file in self._files.values():
                closing.callback(file.close)

    def adapter(self, folder: Path) -> None:
        """Log an adapter folder as a wandb artifact, when tracking.log_adapter asks for it."""
        if not folder.is_dir():
            raise CheckpointError(f"tracking: {folder} is no folder; wanted the folder of a saved adapter")
        if self._section.log_adapter and self._wandb:
            self._wandb.artifact(folder)

    @property
    def wandb_dir(self) -> Path | None:
        """The folder of the wandb run, for `wandb sync`; None without one. Final after close()."""
        return self._wandb.run_dir if self._wandb else None

    @property
    def wandb_url(self) -> str | None:
        """Address of an online run; None offline. Final after close()."""
        return self._wandb.url if self._wandb else None

    def finish(self) -> None:
        """Begin to finish the wandb run of a job that succeeded, without waiting. Nothing is recorded after this."""
        if self._wandb:
            self._wandb.finish(0, self._row, self._rows)

    def close(self, exit_code: int = 0) -> None:
        """Finish the wandb run, within a bounded time, and close the files. A second call does nothing."""
        if self._files[METRICS].closed:
            return
        with contextlib.ExitStack() as closing:
            if self._wandb:
                closing.callback(self._wandb.close, exit_code, self._row, self._rows)
            if self._board:
                closing.callback(self._board.close)
            closing.callback(self._close_files)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.close(0 if kind is None else 130 if issubclass(kind, KeyboardInterrupt) else 1)
        except OSError as failure:
            if kind is None:
                raise
            self._note(f"{self._run_dir}: its files cannot be closed: {failure}")  # the error being raised is the cause


def _without_tokens(row: RolloutRow) -> RolloutRow:
    """The columns that wandb's table shows."""
    return replace(row, pieces=(), advantages=(), ratios=(), sampled=())
