"""Whether a fork server's imports are those that a process would make itself: same code, files and environment."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

PACKAGES = ("actors", "rlsys")
OURS = ("RLSYS_FORKED_BY", "RLSYS_FORK_SERVER", "RLSYS_NOT_FORKED")
# No preloaded module reads these at import, nor variables that begin with LATE: Ray and wandb read their own, and are
# imported after the fork. wandb sets some in a driver before Ray starts.
LATE = ("RAY_", "WANDB_")
FREE = ("TMPDIR", "PWD", "OLDPWD", "SHLVL", "_", "PYTHONBREAKPOINT", "SPT_NOENV", *OURS)


def fingerprint() -> str:
    """Of the files of rlsys, this Python and its packages' folder. Equal on two nodes with equal code."""
    digest = hashlib.sha256(f"{sys.version} {sys.byteorder}".encode())
    for name, file in sorted(_sources()):
        digest.update(f"{name} ".encode())
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()[:32]


def source_files() -> dict[str, tuple[int, int]]:
    """Modification time in ns and size of each file of `fingerprint`, which stays as it is while these do."""
    return {file: _state(file) for _, file in _sources()}


def _state(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_mtime_ns, status.st_size


def _sources() -> Iterator[tuple[str, str]]:
    """All files of rlsys but bytecode, with their names below its folder: code reads YAML and templates beside it."""
    parent = str(Path(__file__).parents[2])
    for package in PACKAGES:
        for folder, folders, names in os.walk(os.path.join(parent, package)):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in names:
                file = os.path.join(folder, name)
                yield file[len(parent) + 1 :], file


def loaded_files(began_ns: int) -> dict[str, tuple[int, int]]:
    """Modification time in ns and size of the file of each module that was imported since `began_ns`. A file that
    was written meanwhile is as if changed: its module may be the former one."""
    found = {}
    for module in list(sys.modules.values()):
        file = module.__dict__.get("__file__") if isinstance(module, ModuleType) else None
        if isinstance(file, str) and file not in found and os.path.isabs(file):
            state = _state(file)
            found[file] = state if state[0] < began_ns else (0, 0)
    return found


def changed_file(files: Mapping[str, tuple[int, int]]) -> str | None:
    """The first file that is not as it was."""
    for file, before in files.items():
        try:
            state = _state(file)
        except OSError:
            return file
        if state != before:
            return file
    return None


def differing(environment: Mapping[str, str], other: Mapping[str, str], free: Sequence[str]) -> list[str]:
    """Variables that differ and that an import may have read: none of those in FREE and LATE, or in `free`."""
    names = {*environment, *other}
    return sorted(
        name
        for name in names
        if environment.get(name) != other.get(name) and name not in (*FREE, *free) and not name.startswith(LATE)
    )


def packages_folder() -> str:
    return sysconfig.get_path("purelib")
