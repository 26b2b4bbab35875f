"""The fork server of one job, whose Ray runs on this machine alone: it imports while Ray starts."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.cluster.joined_address import joined_address
from actors.cluster.threads import threads_of
from actors.forking import checks, client
from actors.forking.client import PROCESSES
from rlsys.config import JobConfig
from rlsys.errors import ClusterError
from rlsys.utils.free_cores import Cores, sample_cores

ROLES = ("actor", "learner", "sampler")
LOG = "log"
PREFIX = "rlsys-fork-"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A fork server of one node. `python`: the node's."""

    folder: str
    fingerprint: str
    python: str
    client: str  # the program, on that node
    threads: int

    def worker_command(self, role: Literal["actor", "learner"]) -> str:
        """Ray's `py_executable` of a worker that is forked."""
        return shlex.join([self.python, "-S", "-E", self.client, self.folder, self.fingerprint, role])

    def variables(self) -> dict[str, str]:
        """Environment of an actor whose host process is forked."""
        return {client.SERVER: f"{self.fingerprint} {self.folder}"}


class ForkServer:
    """The server's processes; they end with this one. Construct it in a thread that lives as long as this process."""

    def __init__(self, threads: int, idle_s: float = 0.0, environment: Mapping[str, str] = os.environ) -> None:
        delete_abandoned()
        self._scratch = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        folder = self._scratch.name
        listeners = {role: _listener(Path(folder, role)) for role in ROLES}
        ours, theirs = os.pipe()
        given = {
            "folder": folder,
            "parent": os.getpid(),
            "alive": ours,
            "listeners": {role: listener.fileno() for role, listener in listeners.items()},
            "idle_s": idle_s,
            "threads": threads,
        }
        program = (  # its own search path is that of Ray's workers; this package may be elsewhere
            "import sys; path = [each for each in sys.path if each]; "
            f"sys.path[:] = {sys.path!r}; from actors.forking import server; server.PATH = path; server.main()"
        )
        with Path(folder, LOG).open("w") as log:  # of the imports; an error there comes again in the ordinary process
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, json.dumps(given)],
                env={client.FORKED: "", **environment},  # see server.find_title
                pass_fds=[ours, *(listener.fileno() for listener in listeners.values())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        Path(folder, PROCESSES).write_text(f"{self._process.pid}\n")
        os.close(ours)
        for listener in listeners.values():
            listener.close()
        self._alive = theirs
        self.address = ServerAddress(folder, checks.fingerprint(), sys.executable, client.__file__, threads)

    def wait(self) -> None:
        """For the server's end; then its folder is deleted."""
        self._process.wait()
        self._scratch.cleanup()

    def processes(self) -> list[int]:
        text = Path(self.address.folder, PROCESSES).read_text()
        return [int(pid) for pid in text.split() if Path(f"/proc/{pid}").exists()]

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return once all is imported.

        Raises:
            ClusterError: the server ended, or the time is over.
        """
        for role in ROLES:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout_s)
                try:
                    connection.connect(str(Path(self.address.folder, role)))
                    client.send(connection, {"describe": True})
                    client.receive(connection)
                except (OSError, EOFError) as error:
                    raise ClusterError(
                        f"the {role} fork server has ended, or imports for over {timeout_s:g} s"
                    ) from error

    def close(self) -> None:
        """End the server. Processes that it forked live on."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            os.close(self._alive)
            self._scratch.cleanup()


def delete_abandoned() -> None:
    """Delete the folders of this user's servers whose owner was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or one that another process is deleting
            pids = (folder / PROCESSES).read_text().split()
            if pids and not any(map(_runs, pids)):  # without any it is being written
                shutil.rmtree(folder)


def _runs(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    return listener


@contextmanager
def job_server(config: JobConfig, sample: Callable[[], Cores] = sample_cores) -> Iterator[ForkServer | None]:
    """The server of a job for the block, where the job can use one: on CPU, with its Ray on this machine, and as many
    threads for learner and sampler. `sample`: called before the server starts, which keeps a core busy."""
    threads = _threads(config, sample)
    if threads is None:
        yield None
        return
    try:
        server = ForkServer(threads)
    except OSError:  # of a temporary folder, which the job itself refuses by name
        yield None
        return
    try:
        yield server
    finally:
        server.close()


def _threads(config: JobConfig, sample: Callable[[], Cores]) -> int | None:
    joins = joined_address(config.cluster.address) is not None
    if joins or (config.learner.device, config.sampler_device) != ("cpu", "cpu"):
        return None
    threads = threads_of(config, sample)
    return threads.learner if threads.learner == threads.sampler else None
