"""Checks this process's environment before Ray starts: temporary folders, home directory, user name.

Clusters set TMPDIR to long paths or to missing folders, and run containers under user ids that have no name. Ray,
Python and vLLM then fail with an internal traceback, or silently use another folder. The checks here report such a
fault in one line that names the variable, at the start of a job and in `rlsys doctor`.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlsys.errors import ClusterError
from rlsys.utils.env_variables import drop_empty_variables, env_variable

SOCKET_LIMIT = 107  # longest path of a Unix socket on Linux, in bytes
# ray/session_2026-11-29_07-46-01_123456_1234567/sockets/plasma_store.12, as named by Ray
RAY_BELOW = 5 + len("session_2026-11-29_07-46-01_123456_1234567/sockets/plasma_store.12")
# rlsys-12345678/pymp-12345678/listener-12345678, the socket of a fork server; vLLM's paths are shorter
OWN_BELOW = 1 + len("rlsys-12345678/pymp-12345678/listener-12345678")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the environment. `fatal`: no job can start; otherwise a job may run without what is missing."""

    name: str
    found: str
    remedy: str
    fatal: bool = True


def check_process_environment(starts_ray: bool) -> None:
    """Unset empty variables, then refuse fatal faults.

    Raises:
        ClusterError: a variable names an unusable folder; the message lists all such faults.
    """
    drop_empty_variables()
    fatal = [f"{fault.found}; {fault.remedy}" for fault in faults(starts_ray) if fault.fatal]
    if fatal:
        raise ClusterError(". ".join(fatal))


def faults(starts_ray: bool) -> Iterator[Fault]:
    """Yield all faults. `starts_ray`: the job starts Ray in this environment instead of joining a cluster."""
    rays = _first_set("RAY_TMPDIR", "TMPDIR") or "RAY_TMPDIR"
    if starts_ray:
        yield from _folder_faults(rays, env_variable(rays) or "/tmp", RAY_BELOW, "Ray's sockets")
    own = _first_set("TMPDIR", "TEMP", "TMP")
    if own is None:
        yield from _folder_faults("TMPDIR (unset)", "/tmp", OWN_BELOW, "sockets of the graders' processes")
    elif not (starts_ray and own == rays):  # checked above, for longer paths
        yield from _folder_faults(own, os.environ[own], OWN_BELOW, "sockets of the graders' processes")
    yield from _home_faults()
    yield from _user_faults()


def _first_set(*names: str) -> str | None:
    return next((name for name in names if env_variable(name)), None)


def _folder_faults(name: str, folder: str, below: int, what: str) -> Iterator[Fault]:
    """Faults of a folder that holds sockets whose paths are `below` bytes longer than the folder's."""
    help_ = f"set {name.split()[0]} to an existing, writable folder with a short path, such as /tmp"
    if not os.path.isdir(folder):
        yield Fault("temporary files", f"{name}: {folder} is not a folder", f"{help_}, or create it")
        return
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone are not enough
    except OSError as error:
        yield Fault("temporary files", f"{name}: {folder} cannot be written: {error.strerror}", help_)
        return
    length, room = len(os.fsencode(os.path.abspath(folder))), SOCKET_LIMIT - below
    if length > room:
        found = f"{name}: {folder} has {length} characters; {what} below it allow at most {room}"
        yield Fault("temporary files", found, help_)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        found = f"{name}: {folder} is mounted noexec, so libraries compiled there cannot be loaded"
        yield Fault("temporary files", found, f"if kernels are compiled for a GPU, {help_}", fatal=False)


def _home_faults() -> Iterator[Fault]:
    try:
        home = Path.home()
    except RuntimeError:
        yield Fault(
            "home", f"HOME is not set, and user {os.getuid()} has no home directory", "set HOME to a writable folder"
        )
        return
    if not os.access(home, os.W_OK | os.X_OK):
        why = "cannot be written" if home.is_dir() else "is not a folder"
        remedy = "set HOME to a writable folder; it holds model caches and Ray's token"
        yield Fault("home", f"HOME: {home} {why}", remedy, fatal=False)


def _user_faults() -> Iterator[Fault]:
    try:
        getpass.getuser()
    except (KeyError, OSError):
        yield Fault(
            "user",
            f"user {os.getuid()} has no name: it is not in the password database, and LOGNAME is not set",
            "set LOGNAME, such as LOGNAME=trainer",
        )
