"""The lock of a run directory: one driver at a time writes a run."""

from __future__ import annotations

from pathlib import Path

from rlsys.errors import RunExistsError
from rlsys.utils import folder_lock

LOCK = "lock"


def acquire(run_dir: Path) -> int:
    """Lock the directory and return the descriptor; closing it releases the lock. See `rlsys.utils.folder_lock`.

    Raises:
        RunExistsError: another driver holds the lock; the message names its process and host.
    """
    try:
        return folder_lock.acquire(run_dir / LOCK)
    except folder_lock.HeldError as error:
        raise RunExistsError(
            f"{run_dir}: another driver is running it ({error.holder}). Wait until that driver ends or stop it (Ctrl-C "
            "stops it after the current step), or give this run another name (run.name=...)"
        ) from None
