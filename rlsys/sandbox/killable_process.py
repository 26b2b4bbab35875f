"""Set-up of a pool process that runs users' code, and the description of its exit."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading

MEMORY_LIMIT_BYTES = 4 * 2**30  # an expression such as 9**9**9 would fill the machine's memory within its time limit


def init_killable_process() -> None:
    """Runs once in a pool process: the process ends with its owner and on SIGTERM, and its memory is limited."""
    threading.Thread(target=_end_with_owner, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for a long call into C to return
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def describe_exit(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return f"signal {-exitcode} ({signal.strsignal(-exitcode)})"


def _end_with_owner() -> None:
    """Otherwise a call that never returns would outlive an owner that was killed."""
    owner = multiprocessing.parent_process()
    assert owner is not None
    owner.join()
    os._exit(1)
