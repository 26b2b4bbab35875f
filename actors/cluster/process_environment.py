"""What the environment of this process has to offer before Ray is started: temporary folders and a home directory.

Clusters set TMPDIR to long paths or to folders that are not there, and run containers as users that nothing knows. Ray,
Python and vLLM meet that with a traceback from deep inside, or use another folder in silence; here it is one line that
names the variable, for a job as for `rlsys doctor`.
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

SOCKET_LIMIT = 107  # bytes of a Unix socket's path that Linux takes
# ray/session_2026-11-29_07-46-01_123456_1234567/sockets/plasma_store.12, as Ray names them
RAY_BELOW = 5 + len("session_2026-11-29_07-46-01_123456_1234567/sockets/plasma_store.12")
# rlsys-12345678/pymp-12345678/listener-12345678 of fork servers; vLLM's are shorter
OWN_BELOW = 1 + len("rlsys-12345678/pymp-12345678/listener-12345678")


@dataclass(frozen=True, slots=True)
class Fault:
    """`fatal`: no job can start here; else it may do without."""

    name: str
    found: str
    remedy: str
    fatal: bool = True


def check_process_environment(starts_ray: bool) -> None:
    """Unset what is empty, and look at the rest.

    Raises:
        ClusterError: a variable names a folder that does not serve its purpose, all of them in one line.
    """
    drop_empty_variables()
    fatal = [f"{fault.found}; {fault.remedy}" for fault in faults(starts_ray) if fault.fatal]
    if fatal:
        raise ClusterError(". ".join(fatal))


def faults(starts_ray: bool) -> Iterator[Fault]:
    """`starts_ray`: a job would start Ray in this environment, in place of joining a cluster."""
    rays = _first_set("RAY_TMPDIR", "TMPDIR") or "RAY_TMPDIR"
    if starts_ray:
        yield from _folder_faults(rays, env_variable(rays) or "/tmp", RAY_BELOW, "Ray's sockets")
    own = _first_set("TMPDIR", "TEMP", "TMP")
    if own is None:
        yield from _folder_faults("TMPDIR (unset)", "/tmp", OWN_BELOW, "sockets of the graders' processes")
    elif not (starts_ray and own == rays):  # which was looked at for longer names
        yield from _folder_faults(own, os.environ[own], OWN_BELOW, "sockets of the graders' processes")
    yield from _home_faults()
    yield from _user_faults()


def _first_set(*names: str) -> str | None:
    return next((name for name in names if env_variable(name)), None)


def _folder_faults(name: str, folder: str, below: int, what: str) -> Iterator[Fault]:
    """Of a folder for sockets whose paths are `below` bytes longer."""
    help_ = f"set {name.split()[0]} to a folder that is there, can be written and has a short path, such as /tmp"
    if not os.path.isdir(folder):
        yield Fault("temporary files", f"{name}: {folder} is no folder", f"{help_}, or make it")
        return
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell
    except OSError as error:
        yield Fault("temporary files", f"{name}: {folder} cannot be written: {error.strerror}", help_)
        return
    length, room = len(os.fsencode(os.path.abspath(folder))), SOCKET_LIMIT - below
    if length > room:
        found = f"{name}: {folder} has {length} characters, and {what} beneath it take {room} at most"
        yield Fault("temporary files", found, help_)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        found = f"{name}: {folder} is mounted noexec, so nothing compiled there can be loaded"
        yield Fault("temporary files", found, f"where a GPU's kernels are compiled, {help_}", fatal=False)


def _home_faults() -> Iterator[Fault]:
    try:
        home = Path.home()
    except RuntimeError:
        yield Fault(
            "home", f"HOME is not set, and user {os.getuid()} has no home directory", "set HOME to a folder to write to"
        )
        return
    if not os.access(home, os.W_OK | os.X_OK):
        why = "cannot be written" if home.is_dir() else "is no folder"
        remedy = "set HOME to a folder to write to; caches of models and Ray's token are kept there"
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
