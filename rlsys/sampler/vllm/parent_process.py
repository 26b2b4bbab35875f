"""An engine's processes end with their actor: a lingering one holds memory that the next engine needs."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading

PR_SET_PDEATHSIG = 1  # of Linux' prctl.h


def die_with_parent() -> None:
    """For a process that was forked by a server, or that is a worker of an engine's process."""
    if multiprocessing.parent_process() is None:
        return
    # A stopped process runs no threads, but the kernel's signal reaches it. It comes when the process that forked this
    # one ends: the actor's host, a fork server, which ends with the process that started it, or the engine's process.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    exit_with_parent()


def end_with(parent: int) -> None:
    """For a fresh process that process `parent` started, in a thread that lives as long as that process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def exit_with_parent() -> None:
    """The same of a spawned process. Without the kernel's signal, which comes as soon as the thread that spawned it
    ends, and an actor's thread may end before the actor."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="rlsys-parent-watch", daemon=True).start()
