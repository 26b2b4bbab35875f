"""Asks the fork server of this node for a process. As a program: the process that Ray starts for a forked worker.

    python -S -E client.py FOLDER FINGERPRINT ROLE WORKER_PROGRAM [ARGUMENT]...

The program waits for the worker and ends as it ends; without an answer it becomes the ordinary worker itself. It starts
with every such worker, so this file imports the standard library alone, and little of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

QUIET_S = 1.0  # without an answer or any CPU time of the server: it hangs
LONGEST_S = 120.0  # for the server's imports
POLL_S = 0.05
SIZE = 4  # bytes before each message
NOT_FORKED = "RLSYS_NOT_FORKED"  # in a worker that could not be forked: the reason
FORKED = "RLSYS_FORKED_BY"  # in a forked process: the server's id
SERVER = "RLSYS_FORK_SERVER"  # in a sampler actor: where it asks for its host process
PROCESSES = (
    "processes"  # file with the ids of the server's processes; its modification time is that of the last request
)
READY = "ready"  # file that is there once the server of actors answers at once
UNKNOWN_EXIT = 255  # of a process whose server ended first
LIMITS = ("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_STACK")
NAMESPACES = ("ipc", "mnt", "net", "pid", "user", "uts", "cgroup")


def why_not_forked() -> str:
    """Why this process was not forked although its node has a fork server; else an empty text."""
    return os.environ.get(NOT_FORKED, "")


class NotForkedError(Exception):
    """The server gives no process; the message says why."""


class Forked:
    """A process that the server forked for this process. It is killed when this process ends, however it ends."""

    def __init__(self, pid: int, connection: socket.socket, lifeline: int) -> None:
        self.pid, self.returncode = pid, None  # type: int, int | None
        self._connection, self._lifeline = connection, lifeline
        self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Exit code as of `subprocess`, once the process has ended."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            try:
                status: int | None = receive(self._connection)["status"]
            except (OSError, EOFError):
                status = None  # the server is gone; its processes live on
            if status is not None:
                self._end(status)
            elif select.select([self._handle], [], [], 0)[0]:
                self._end(UNKNOWN_EXIT)
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            waited = [self._handle] if select.select([self._connection], [], [], 0)[0] else [self._connection]
            select.select(waited, [], [], None)
        return code

    def kill(self) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _end(self, code: int) -> None:
        self.returncode = code
        self._connection.close()
        os.close(self._lifeline)
        os.close(self._handle)


def fork(
    folder: str,
    role: str,
    fingerprint: str,
    arguments: Sequence[str],
    entry: str = "",
    descriptors: Sequence[int] = (),
    path: Sequence[str] = (),
    oom: int | None = None,
) -> Forked:
    """A process like one that this process would start now: with its environment, folder, limits and output files. It
    runs the program `arguments[0]`, or calls `entry`, written module:function, with `descriptors` and `path` as its
    search path. `oom`: its OOM score, instead of this process's.

    Raises:
        NotForkedError: no server, another one than expected, one that hangs, or one whose imports do not fit here.
    """
    request = {
        "fingerprint": fingerprint,
        "arguments": list(arguments),
        "entry": entry,
        "path": list(path),
        "environment": {name: value for name, value in os.environ.items() if name != SERVER or not entry},
        "executable": sys.executable,
        **surroundings(),
        **({} if oom is None else {"oom": oom}),
    }
    try:
        connection = _connect(folder, role)
    except OSError as error:
        raise NotForkedError(f"no server answers in {folder}: {error.strerror or error}") from None
    ours, theirs = os.pipe()
    try:
        _send(connection, request, [0, 1, 2, ours, *descriptors])
        answer = _answer(connection, folder)
        if "refused" in answer:
            raise NotForkedError(str(answer["refused"]))
        return Forked(int(answer["pid"]), connection, theirs)
    except (OSError, EOFError, ValueError) as error:
        connection.close()
        os.close(theirs)
        raise NotForkedError(f"the server in {folder} ended before it answered") from error
    except NotForkedError:
        connection.close()
        os.close(theirs)
        raise
    finally:
        os.close(ours)


def surroundings() -> dict[str, object]:
    """What a process inherits, beside environment and files. JSON."""
    with open("/proc/self/oom_score_adj") as file:
        oom = int(file.read())
    with open("/proc/self/cgroup") as file:
        cgroup = file.read()
    os.umask(mask := os.umask(0))
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
    return {
        "folder": os.getcwd(),
        "umask": mask,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "cores": sorted(os.sched_getaffinity(0)),
        "oom": oom,
        "cgroup": cgroup,
        "namespaces": [_link(f"/proc/self/ns/{name}") for name in NAMESPACES],
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS},
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "ignored": sorted(map(int, ignored)),
    }


def send(connection: socket.socket, message: Mapping[str, object]) -> None:
    _send(connection, message, [])


def receive(connection: socket.socket) -> dict[str, int]:
    """
    Raises:
        EOFError: the other end is closed.
    """
    message, _ = receive_with_files(connection, 0)
    return message  # type: ignore[return-value]  # of the server


def receive_with_files(connection: socket.socket, most: int) -> tuple[dict[str, object], list[int]]:
    data, files, _, _ = socket.recv_fds(connection, 1 << 16, most)
    while not _complete(data):
        more = connection.recv(1 << 16)
        if not more:
            for file in files:
                os.close(file)
            raise EOFError
        data += more
    return json.loads(data[SIZE:]), files


def _complete(data: bytes) -> bool:
    return len(data) >= SIZE and len(data) >= SIZE + int.from_bytes(data[:SIZE])


def kill_with_lifeline(pid: int, lifeline: int) -> None:
    """Have the kernel kill process `pid`, also while it is stopped or busy, when the last process that holds the other
    end of the pipe has ended; kill it now where that has happened already."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, pid)
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        os.kill(pid, signal.SIGKILL)


def _send(connection: socket.socket, message: Mapping[str, object], files: Sequence[int]) -> None:
    body = json.dumps(message).encode()
    data = len(body).to_bytes(SIZE) + body
    sent = socket.send_fds(connection, [data], files)
    if sent < len(data):  # a peer that has it all may have answered and closed
        connection.sendall(data[sent:])


def _connect(folder: str, role: str) -> socket.socket:
    """Only to a server of this user: the folder would be another's otherwise."""
    status = os.lstat(folder)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(1, "the folder is not this user's alone")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(QUIET_S)
        connection.connect(os.path.join(folder, role))
    except OSError:
        connection.close()
        raise
    connection.settimeout(LONGEST_S)
    return connection


def _answer(connection: socket.socket, folder: str) -> dict[str, int]:
    """Wait while the server imports, which shows in its CPU time."""
    began = moved = time.monotonic()
    before = _activity(folder)
    while not select.select([connection], [], [], POLL_S)[0]:
        now, activity = time.monotonic(), _activity(folder)
        if activity != before:
            before, moved = activity, now
        if now - moved > QUIET_S:
            raise NotForkedError(f"the server in {folder} has neither answered nor computed for {QUIET_S:g} s")
        if now - began > LONGEST_S:
            raise NotForkedError(f"the server in {folder} has not answered for {LONGEST_S:g} s")
    return receive(connection)


def _activity(folder: str) -> list[str]:
    """Changes while a process of the server computes, or waits for a core or a disk."""
    found = []
    try:
        with open(os.path.join(folder, PROCESSES)) as file:
            processes = file.read().split()
    except OSError:
        processes = []
    for process in processes:
        try:
            with open(f"/proc/{process}/stat") as file:
                state, *fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        waits = str(time.monotonic()) if state in "RD" else ""  # for a core or a disk; one that hangs sleeps
        found += [fields[10], fields[11], waits]  # utime, stime
    return found


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def main(folder: str, fingerprint: str, role: str, program: list[str]) -> None:
    """Become a forked worker, or the ordinary one."""
    try:
        worker = fork(folder, role, fingerprint, program)
    except NotForkedError as error:
        os.environ[NOT_FORKED] = str(error)
        os.execv(sys.executable, [sys.executable, *program])
    code = worker.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
