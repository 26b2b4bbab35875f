"""A run's copy in wandb, written by a thread: training never waits for wandb, and a failure there costs the copy only.

A resumed run keeps its wandb id. Metrics that the run's files hold are sent again: a process that is killed loses up
to 20 s of metrics that wandb had not written yet. metrics.jsonl has the row number of each metric, so a row that wandb
has is recognised, and nothing is sent twice. Offline, a resumed run gets a new folder with all its rows; the earlier
folders of the same id move to wandb/superseded. A repeated step whose row is already online keeps its first values.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlsys.config import TrackingSection
from rlsys.run_state.jsonl import METRICS, TOKEN_FIELDS, Note, Record, RolloutRow, metrics_of
from rlsys.utils.env_variables import env_variable, set_default
from rlsys.utils.shell_paths import command

if TYPE_CHECKING:
    import wandb

SUPERSEDED = "superseded"  # folder of offline wandb runs that a later one with the same id has replaced
CONNECT_TIMEOUT_S = 15.0  # for wandb's server to answer; after that the run is an offline one
FINISH_TIMEOUT_S = 30.0  # for the last upload; the rest stays in the run directory for `wandb sync`
CLOSE_TIMEOUT_S = 75.0  # for all remaining work at the end of a job, starting included
MAX_TABLE_ROWS = 10_000  # the most that wandb shows of a table

WandbCall = Callable[["wandb.Run"], object]


class WandbRun:
    """wandb behind a queue: every call to it happens in one thread, in the order asked for.

    wandb's own step must never decrease, while the supervised stage and RL both count from 0. So wandb's step is a row
    number that increases when (stage, step) changes. Calls for one step share a row, where wandb merges them; the
    x-axis is the metric `step` (or `sft/step`) of that row. wandb has all rows before `_have`, and row `_have` takes
    further values.
    """

    def __init__(
        self,
        parent: Path,
        section: TrackingSection,
        name: str,
        run_id: str | None,
        config: Mapping[str, object],
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
        self._finishing = False
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def repeat(self, records: Sequence[Record], rows: Sequence[RolloutRow]) -> None:
        """Send the lines of the files, except rows that wandb has."""
        of_step: dict[int, list[RolloutRow]] = {}
        for row in rows:
            of_step.setdefault(row.step, []).append(row)
        last = {record["row"]: i for i, record in enumerate(records)}
        for i, record in enumerate(records):
            self.log(record, repeated=True)
            if record["stage"] == "rl" and last[record["row"]] == i and record["step"] in of_step:
                self.table(record["row"], record["step"], of_step[record["step"]])

    def log(self, record: Record, repeated: bool = False) -> None:
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

    def _put(self, run: wandb.Run, row: int, values: Mapping[str, object]) -> None:
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

    def finish(self, exit_code: int, row: int, rows: Sequence[RolloutRow]) -> None:
        """Have the thread send what is left and finish, without waiting. A second call does nothing."""
        if self._finishing:
            return
        self._finishing = True
        if rows:  # after the run the table shows all its rollouts, not those of the last step
            if len(rows) > MAX_TABLE_ROWS:
                self._note(f"wandb: the table shows the last {MAX_TABLE_ROWS} of {len(rows)} rollouts")
            shown = list(rows[-MAX_TABLE_ROWS:])
            self._calls.put(lambda run: self._put(run, max(row, self._have), {"rollouts": _table(shown)}))
        self._exit_code = exit_code
        self._calls.put(None)

    def close(self, exit_code: int, row: int, rows: Sequence[RolloutRow]) -> None:
        """As `finish`; returns when the thread has ended, or after CLOSE_TIMEOUT_S."""
        self.finish(exit_code, row, rows)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._note(f"wandb: did not finish within {CLOSE_TIMEOUT_S:g} s and was abandoned; {METRICS} is complete")

    def _serve(self) -> None:
        """Body of the thread. Catches every exception: if wandb fails, the run continues without it."""
        try:
            run = self._start()
            while (call := self._calls.get()) is not None:
                call(run)
            self._finish(run)
        except Exception as error:  # wandb raises many types; the job continues without the copy, and says so
            rest = f"; what it has so far: {command('wandb', 'sync', self.run_dir)}" if self.run_dir else ""
            self._note(f"wandb: gave up ({type(error).__name__}: {error}); {METRICS} is complete without it{rest}")

    def _finish(self, run: wandb.Run) -> None:
        import wandb

        run.finish(exit_code=self._exit_code)
        wandb.teardown()  # waits for wandb's process: finish() returns before the last records are in the file
        if self.url is None:
            self._note(f"wandb: offline run written; to upload it: {command('wandb', 'sync', str(self.run_dir))}")

    def _start(self) -> wandb.Run:
        # no crash reports to wandb unless the owner of the machine asks for them with "true"
        set_default("WANDB_ERROR_REPORTING", "false")
        import wandb
        from wandb import util

        # Else wandb imports pandas for the first table, to ask whether a value is a data frame: 0.3 s and 40 MiB.
        util.pd_available = False
        wandb.setup(settings=wandb.Settings(silent=True))
        run = None
        try:
            mode, why = self._mode()
            if mode == "online":
                run = self._init("online")
        except wandb.Error as error:  # an invalid key, or no answer from the server
            mode, why = "offline", str(error).splitlines()[0]
        run = run or self._init("offline")
        self.run_dir = Path(run.settings.sync_dir)
        self._have = run.step  # of a resumed online run: what the server has
        self.url = run.url if mode == "online" else None
        self._note(f"wandb: online at {self.url}" if self.url else f"wandb: offline ({why}), in {self.run_dir}")
        return run

    def _mode(self) -> tuple[str, str]:
        """online or offline, and why. Contacts no server; WANDB_MODE decides where tracking.wandb is auto."""
        import wandb
        from wandb.sdk.lib import wbauth  # private, but nothing else knows every place of a key

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
        """Move earlier offline folders of this run away from `wandb sync`: the new folder has all their rows."""
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
                finish_timeout_raises=True,  # without it a silent run would report nothing
            ),
        )


def _table(rows: Sequence[RolloutRow]) -> wandb.Table:
    import wandb

    names = [field.name for field in fields(RolloutRow) if field.name not in TOKEN_FIELDS]
    return wandb.Table(columns=names, data=[[getattr(row, name) for name in names] for row in rows])
