"""What a run writes down: its files (rlsys.run_state.jsonl) always, wandb and TensorBoard beside them. docs/metrics.md
has all.

The files are the record and are on the disk when a call returns. wandb is a copy, made by a thread of its own: training
never waits for it, and whatever goes wrong there is told to the user and costs the copy only.

A run that is gone on with keeps its wandb id. The files are cut back to the step that it goes on from, and what they
hold is sent again: a process that is killed takes up to 20 s of figures with it that wandb had not written yet, while
the files have them. A figure's row in wandb is written beside it, so that a row which is there already is known by its
number and nothing is sent twice. Offline that means a new folder with the whole run; the folders before it, of the same
id, move to wandb/superseded. A step that is done again, and whose row online is there, keeps the first figures there.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rlsys.config import TrackingSection, yaml_text
from rlsys.errors import CheckpointError
from rlsys.run_state.jsonl import (
    CONFIG,
    ENVIRONMENT,
    GROUPS,
    METRICS,
    RECORD_KEYS,
    ROLLOUTS,
    TOKEN_FIELDS,
    GroupsRow,
    Note,
    RolloutRow,
    cut_lines,
    metrics_of,
    open_to_append,
    rollout_of,
    write_line,
)
from rlsys.tracking.system_metrics import environment
from rlsys.tracking.tensorboard import TensorBoardWriter
from rlsys.utils.atomic_files import replace_file
from rlsys.utils.env_variables import env_variable, set_default
from rlsys.utils.shell_paths import command

if TYPE_CHECKING:
    import wandb

SUPERSEDED = "superseded"  # folder of the offline wandb runs that a later one of the same id has replaced
CONNECT_TIMEOUT_S = 15.0  # for wandb's server to answer; after that the run is an offline one
FINISH_TIMEOUT_S = 30.0  # for the last upload; what is left stays in the run directory for `wandb sync`
CLOSE_TIMEOUT_S = 75.0  # for all that is left to do at the end of a job, starting included
MAX_TABLE_ROWS = 10_000  # the most that wandb shows of a table

WandbCall = Callable[["wandb.Run"], object]


class Tracker:
    """Writes one run down. A context manager: leaving it on an error closes wandb with exit code 1 (130 for Ctrl-C)."""

    def __init__(
        self,
        run_dir: Path,
        section: TrackingSection,
        run_name: str,
        config: Mapping[str, Any],
        note: Note = print,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        *,
        wandb_id: str | None = None,
        resume_from: int | None = None,
        keep_supervised: bool = False,
    ) -> None:
        """`note` takes sentences for the user, from any thread; `config` is written to config.yaml and to wandb.

        Figures and rollouts of RL steps after `resume_from` are removed, all of them when it is None; those of the
        supervised stage too, unless its base is kept. The same `wandb_id` again continues that run.
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
        self._files: dict[str, TextIO] = {}  # open to append, by name
        kept = self._cut(-1 if resume_from is None else resume_from, keep_supervised)
        self._section = section
        self._board = TensorBoardWriter(run_dir, config_text, kept) if section.tensorboard else None
        self._wandb: _Wandb | None = None
        if section.wandb == "disabled":
            note("wandb: off (tracking.wandb: disabled)")
        else:
            whole_config = {**config, "environment": found_environment}
            self._wandb = _Wandb(run_dir, section, run_name, wandb_id, whole_config, note, connect_timeout_s)
            self._wandb.repeat(kept, self._rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write figures of one step; names of the supervised stage begin with ``sft/`` and count steps of their own.

        Of two values of one name and step the later one counts.
        """
        supervised = {name.startswith("sft/") for name in metrics}
        assert len(supervised) == 1, f"one call logs figures of one stage, and at least one: {sorted(metrics)}"
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
        """Write completions down; in wandb they are the table `rollouts` of this step."""
        if not rows:
            return
        for row in rows:
            write_line(self._files[ROLLOUTS], asdict(row), sync=row is rows[-1])
        self._rows.extend(map(_without_tokens, rows))
        if self._wandb:
            self._wandb.table(self._row, int(step), rows)

    def groups(self, step: int, problems: Sequence[int], solved: Sequence[float], grades: Sequence[float] = ()) -> None:
        """Write down what became of a step's groups: ids of their problems, share solved and mean grade of each."""
        assert len(problems) == len(solved), f"{len(problems)} problems and {len(solved)} shares"
        row = GroupsRow(int(step), [int(problem) for problem in problems], [*map(float, solved)], [*map(float, grades)])
        write_line(self._files[GROUPS], asdict(row))

    def roll_back(self, step: int) -> None:
        """Remove what was written of RL steps after `step`, -1: all: they are being done again."""
        self._close_files()
        self._cut(step, keep_supervised=True)
        if self._board:
            self._board.roll_back(step)

    def _cut(self, step: int, keep_supervised: bool) -> list[dict[str, Any]]:
        """Cut the files back, open them, and stand at the last line kept. Returns the lines of metrics.jsonl."""

        def keeps(record: Mapping[str, Any]) -> bool:
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
        """All of them, whatever a full disk says to the first.

        Raises:
            OSError: what was written last of one is not on the disk.
        """
        with contextlib.ExitStack() as closing:
            for file in self._files.values():
                closing.callback(file.close)

    def adapter(self, folder: Path) -> None:
        """Log an adapter folder as a wandb artifact, when tracking.log_adapter asks for it."""
        if not folder.is_dir():
            raise CheckpointError(f"tracking: {folder} is no folder; wanted the adapter that was saved")
        if self._section.log_adapter and self._wandb:
            self._wandb.artifact(folder)

    @property
    def wandb_dir(self) -> Path | None:
        """The folder of the wandb run, for `wandb sync`; None when there is none (yet). Sure after close()."""
        return self._wandb.run_dir if self._wandb else None

    @property
    def wandb_url(self) -> str | None:
        """Where an online run is seen; None offline. Sure after close()."""
        return self._wandb.url if self._wandb else None

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
            self._note(f"{self._run_dir}: its files cannot be closed: {failure}")  # the error on its way is the cause


class _Wandb:
    """wandb behind a queue: every call to it happens in one thread, in the order asked for.

    wandb's own step must never go back, and the supervised stage and RL both count from the start. So it is a row
    number that moves on when (stage, step) changes; calls for one step share a row, where wandb merges them, and the
    x-axis is the metric `step` (or `sft/step`) in the same row. Rows before `_have` are there; the one at `_have` can
    still be added to.
    """

    def __init__(
        self,
        parent: Path,
        section: TrackingSection,
        name: str,
        run_id: str | None,
        config: Mapping[str, Any],
        note: Note,
        connect_timeout_s: float,
    ) -> None:
        self.run_dir: Path | None = None
        self.url: str | None = None
        self._note = note
        self._section = section
        self._config = dict(config)
        self._parent = parent
        self._name = name
        self._id = run_id
        self._connect_timeout_s = connect_timeout_s
        self._have = 0
        self._known: set[str] = set()
        self._calls: queue.SimpleQueue[WandbCall | None] = queue.SimpleQueue()
        self._exit_code = 0
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def repeat(self, records: Sequence[Mapping[str, Any]], rows: Sequence[RolloutRow]) -> None:
        """Send what the files hold, rows that are there excepted."""
        of_step: dict[int, list[RolloutRow]] = {}
        for row in rows:
            of_step.setdefault(row.step, []).append(row)
        last = {record["row"]: i for i, record in enumerate(records)}
        for i, record in enumerate(records):
            self.log(record, repeated=True)
            if record["stage"] == "rl" and last[record["row"]] == i and record["step"] in of_step:
                self.table(record["row"], record["step"], of_step[record["step"]])

    def log(self, record: Mapping[str, Any], repeated: bool = False) -> None:
        """A line of metrics.jsonl."""
        row, axis = record["row"], "sft/step" if record["stage"] == "sft" else "step"
        metrics = {name: float(value) if repeated else value for name, value in metrics_of(record).items()}
        new = [name for name in metrics if name not in self._known]
        self._known.update(new)

        def call(run: wandb.Run) -> None:
            for name in new:
                run.define_metric(name, step_metric=axis)
            self._put(run, row, {axis: record["step"], **metrics})

        self._calls.put(call)

    def table(self, row: int, step: int, rows: Sequence[RolloutRow]) -> None:
        def call(run: wandb.Run) -> None:
            if row >= self._have:
                self._put(run, row, {"step": step, "rollouts": _table(rows)})

        self._calls.put(call)

    def _put(self, run: wandb.Run, row: int, values: Mapping[str, Any]) -> None:
        if row >= self._have:
            run.log(dict(values), step=row)
            self._have = row

    def artifact(self, folder: Path) -> None:
        def call(run: wandb.Run) -> None:
            import wandb

            artifact = wandb.Artifact(f"{self._name}-adapter", type="model", metadata={"format": "peft"})
            # immutable: refer to the files where they lie instead of copying them to wandb's cache
            artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

        self._calls.put(call)

    def close(self, exit_code: int, row: int, rows: Sequence[RolloutRow]) -> None:
        if rows:  # what the table shows once the run is over: the whole run, not its last step
            if len(rows) > MAX_TABLE_ROWS:
                self._note(f"wandb: the table shows the last {MAX_TABLE_ROWS} of {len(rows)} rollouts")
            whole = list(rows[-MAX_TABLE_ROWS:])
            self._calls.put(lambda run: self._put(run, max(row, self._have), {"rollouts": _table(whole)}))
        self._exit_code = exit_code
        self._calls.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._note(f"wandb: did not finish in time and was left behind; {METRICS} is complete")

    def _serve(self) -> None:
        """The thread. Its edge takes any exception: wandb may fail, and then the run goes on without it."""
        try:
            run = self._start()
            while (call := self._calls.get()) is not None:
                call(run)
            self._finish(run)
        except Exception as error:
            rest = f"; what it has so far: {command('wandb', 'sync', self.run_dir)}" if self.run_dir else ""
            self._note(f"wandb: gave up ({type(error).__name__}: {error}); {METRICS} is complete without it{rest}")

    def _finish(self, run: wandb.Run) -> None:
        import wandb

        run.finish(exit_code=self._exit_code)
        wandb.teardown()  # waits for wandb's process: finish() returns before the last records are in the file
        if self.url is None:
            self._note(f"wandb: offline run written; to upload it: {command('wandb', 'sync', str(self.run_dir))}")

    def _start(self) -> wandb.Run:
        # no crash reports to wandb's makers from a machine whose owner did not ask for them ("true" sends them)
        set_default("WANDB_ERROR_REPORTING", "false")
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))
        run = None
        try:
            mode, why = self._mode()
            if mode == "online":
                run = self._init("online")
        except wandb.Error as error:  # a key that is none, or no answer from the server
            mode, why = "offline", str(error).splitlines()[0]
        run = run or self._init("offline")
        self.run_dir = Path(run.settings.sync_dir)
        self._have = run.step  # online, of a run that is continued: what the server has
        self.url = run.url if mode == "online" else None
        self._note(f"wandb: online at {self.url}" if self.url else f"wandb: offline ({why}), in {self.run_dir}")
        return run

    def _mode(self) -> tuple[str, str]:
        """online or offline, and why. Asks no server; WANDB_MODE decides where the config says auto."""
        import wandb
        from wandb.sdk.lib import wbauth  # private, but the only code that knows every place where a key may lie

        wanted, asked_by = self._section.wandb, f"tracking.wandb: {self._section.wandb}"
        if wanted == "auto" and env_variable("WANDB_MODE") in ("offline", "dryrun", "disabled"):
            return "offline", f"WANDB_MODE={os.environ['WANDB_MODE']}"
        if wanted == "offline":
            return "offline", asked_by
        host = wandb.setup().settings.base_url
        if wbauth.authenticate_session(host=host, source="rlsys", prompt=False, update_session=False) is None:
            return "offline", f"not logged in to {host}; `wandb login` changes that"
        return "online", asked_by

    def _supersede(self) -> None:
        """Put earlier offline folders of this run where `wandb sync` does not look: the new one repeats all of them."""
        earlier = sorted((self._parent / "wandb").glob(f"offline-run-*-{self._id}")) if self._id else []
        for folder in earlier:
            aside = folder.parent / SUPERSEDED
            aside.mkdir(exist_ok=True)
            folder.rename(aside / folder.name)

    def _init(self, mode: Literal["online", "offline"]) -> wandb.Run:
        import wandb

        self._supersede()
        return wandb.init(
            id=self._id,
            resume="allow" if self._id else None,
            project=self._section.project,
            name=self._name,
            tags=self._section.tags,
            config=self._config,
            mode=mode,
            dir=str(self._parent),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=self._connect_timeout_s if mode == "online" else CLOSE_TIMEOUT_S,
                login_timeout=1.0,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,  # silent, it would say nothing otherwise
            ),
        )


def _without_tokens(row: RolloutRow) -> RolloutRow:
    """As a table shows it."""
    return replace(row, pieces=(), advantages=(), ratios=(), sampled=())


def _table(rows: Sequence[RolloutRow]) -> wandb.Table:
    import wandb

    names = [field.name for field in fields(RolloutRow) if field.name not in TOKEN_FIELDS]
    return wandb.Table(columns=names, data=[[getattr(row, name) for name in names] for row in rows])
