"""Logs and errors of actors: the tail of a live or dead actor's log, and the first error of a chain of failures."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.core.generated import gcs_pb2
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.errors import ActorDiedError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

LINES = 20
TIMEOUT_S = 6.0
TAIL_BYTES = 64_000
_MARKERS = (":job_id:", ":actor_name:", ":task_name:")


@dataclass(frozen=True, slots=True)
class Process:
    """An actor's process, as recorded in Ray's GCS."""

    pid: int
    ip: str
    worker: str  # hex ids
    node: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.ip}"


def actor_id(actor: ActorHandle) -> str:
    found: str = actor._actor_id.hex()
    return found


def process_of(actor: ActorHandle) -> Process | None:
    """The actor's process; None before it has one. Reads the GCS, because ray.util.state needs Ray's dashboard."""
    accessor = ray._private.state.state._connect_and_get_accessor()
    packed = accessor.get_actor_info(actor._actor_id)
    if packed is None:
        return None
    info = gcs_pb2.ActorTableData.FromString(packed)
    if not info.pid:
        return None
    address = info.address
    return Process(info.pid, address.ip_address, address.worker_id.hex(), address.node_id.hex())


def tail(actor: ActorHandle, lines: int = LINES, timeout_s: float = TIMEOUT_S) -> str:
    """The last lines that the actor's process wrote, below a line with file and process; or the reason why there is no
    log.

    Never raises, and never takes longer than the limit: it is called while another error is reported.
    """
    found = ["no answer from the cluster in time"]

    def look() -> None:
        try:
            found[0] = _tail(actor, lines, timeout_s)
        except (RayError, OSError, RuntimeError, ValueError) as error:
            found[0] = f"no log: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    looking = threading.Thread(target=look, name="rlsys-log-tail", daemon=True)
    looking.start()
    looking.join(timeout_s + 1)
    return found[0]


def _tail(actor: ActorHandle, lines: int, timeout_s: float) -> str:
    process = process_of(actor)
    if process is None:
        return "no log: the actor never had a process"
    here = process.node == ray.get_runtime_context().get_node_id()
    files = read_tails(process.worker, process.pid, lines) if here else {}
    if not files:
        if not any(node["NodeID"] == process.node and node["Alive"] for node in ray.nodes()):
            return f"no log: its node ({process.ip}) is gone, and the log with it"
        there = NodeAffinitySchedulingStrategy(process.node, soft=False)
        reading = ray.remote(read_tails).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        files = ray.get(reading.remote(process.worker, process.pid, lines), timeout=timeout_s)
    if not files:
        return f"no log of {process}"
    return "\n".join(_shown(path, text, process) for path, text in files.items())


def _shown(path: str, text: list[str], process: Process) -> str:
    return "\n".join([f"end of {path} ({process}):", *(f"  | {line}" for line in text or ["(empty)"])])


def read_tails(worker: str, pid: int, lines: int) -> Mapping[str, list[str]]:
    """File -> its last lines, on this node: the process's stderr, or its stdout if stderr is empty."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    found: dict[str, list[str]] = {}
    for kind in ("err", "out"):
        for path in folder.glob(f"worker-{worker}-*-{pid}.{kind}"):
            found[str(path)] = _last_lines(path, lines)
        if any(found.values()):
            break
    return {path: text for path, text in found.items() if text} or dict(list(found.items())[:1])


def _last_lines(path: Path, lines: int) -> list[str]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode(errors="replace").splitlines()
    return [line for line in text if line.strip() and not line.startswith(_MARKERS)][-lines:]


@dataclass(frozen=True, slots=True)
class Failure:
    """One error, with the log of the actor that caused it."""

    at: float  # seconds since the epoch, when the driver saw the error
    who: str
    text: str
    tail: str  # end of the actor's log; empty if no actor caused the error

    def __str__(self) -> str:
        said = f"at {time.strftime('%H:%M:%S', time.localtime(self.at))}: {self.text}"
        return f"{said}\n{self.tail}" if self.tail else said


class Failures:
    """Errors since the last completed step; the first one is the cause of the others.

    With a `file`, each error is also appended there, with its traceback and log tail.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.names: dict[str, str] = {}  # actor id -> name in messages
        self._seen: list[Failure] = []

    def name(self, actor: ActorHandle, who: str) -> None:
        """Register an actor's name, for errors that arrive through other actors."""
        self.names[actor_id(actor)] = who

    def add(self, who: str, error: BaseException, actor: ActorHandle | None = None) -> None:
        """Record an error once. `actor`: the actor that caused it, whose log is added."""
        if any(failure.text == str(error) for failure in self._seen):
            return
        seen = Failure(time.time(), who, str(error), tail(actor) if actor is not None else "")
        self._seen.append(seen)
        if self.file is not None:
            entry = "\n".join([f"{type(error).__name__} {seen}", *getattr(error, "__notes__", [])])
            with contextlib.suppress(OSError), self.file.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{entry}\n\n")  # on a full disk the run's final error is about the disk

    def first(self) -> str:
        """Text of the first error with the tail of its log; empty if there is no error."""
        return f"first error {self._seen[0]}" if self._seen else ""

    def forget(self) -> None:
        """Drop all errors: a step was completed, so the run has recovered from them."""
        self._seen.clear()

    def gone(self, what: str, limit: int) -> ActorDiedError:
        """Error that ends a run after too many deaths: `what` died, the key with the limit, and the first error."""
        return ActorDiedError("\n".join([f"{what} (cluster.max_restarts is {limit})", self.first()]).rstrip())

    def report(self, last: BaseException) -> str:
        """The run's final message: the error that ended it, and the first error if that is another one."""
        if not self._seen or self._seen[0].text in str(last):
            return str(last)
        return f"{last}\n{self.first()}"
