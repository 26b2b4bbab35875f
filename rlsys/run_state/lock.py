"""The lock of a run directory: one driver at a time writes a run."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from rlsys.errors import RunExistsError
from rlsys.utils.manifest import to_json

LOCK = "lock"


def acquire(run_dir: Path) -> int:
    """Lock the directory (flock) and return the descriptor; closing it releases the lock, as the death of this process
    does. Child processes do not inherit the descriptor, so what a dead driver started holds no lock.

    Raises:
        RunExistsError: another driver holds the lock; the message names its process and host.
    """
    handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(handle, 1000, 0))
        os.close(handle)
        raise RunExistsError(
            f"{run_dir}: another driver is running it ({holder}). Wait until that driver ends or stop it (Ctrl-C stops "
            "it after the current step), or give this run another name (run.name=...)"
        ) from None
    except BaseException:
        os.close(handle)
        raise
    os.ftruncate(handle, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    os.pwrite(handle, to_json({"pid": os.getpid(), "host": socket.gethostname(), "since": since}), 0)
    return handle


def _holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, TypeError, KeyError):
        return "its process id is not written yet"
