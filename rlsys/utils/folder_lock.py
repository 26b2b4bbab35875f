"""A file that one process at a time holds (flock): the lock of a run directory, and of a server's checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from rlsys.utils.manifest import to_json


class HeldError(Exception):
    """Another process holds the lock. `holder`: which one, and since when."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


def acquire(file: Path) -> int:
    """Lock `file`, which is created, and return its descriptor; closing it releases the lock, as the death of this
    process does. Child processes do not inherit the descriptor, so what a dead process started holds no lock.

    Raises:
        HeldError: another process holds it.
        OSError: the file cannot be created, or is a link.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(handle, 1000, 0))
        os.close(handle)
        raise HeldError(holder) from None
    except BaseException:
        os.close(handle)
        raise
    os.ftruncate(handle, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    with suppress(OSError):  # a full disk: the lock holds without its note
        os.pwrite(handle, to_json({"pid": os.getpid(), "host": socket.gethostname(), "since": since}), 0)
    return handle


def _holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, TypeError, KeyError):
        return "its process id is not written yet"
