"""What a process that runs somebody else's code is told at its start, and how its end is put in words."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading

MEMORY_LIMIT_BYTES = 4 * 2**30  # powers of powers would take the machine's memory before their time is up
TEXT_TAIL = 2000  # characters of a traceback that are kept


def init_killable_process() -> None:
    """Runs once in a process of a pool: it ends with its owner, on the first signal, and takes no more memory."""
    threading.Thread(target=_end_with_owner, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for a long call into C to return
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def describe_exit(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return f"signal {-exitcode} ({signal.strsignal(-exitcode)})"


def _end_with_owner() -> None:
    """What never returns would outlive an owner that was killed and could not kill it."""
    owner = multiprocessing.parent_process()
    assert owner is not None
    owner.join()
    os._exit(1)
