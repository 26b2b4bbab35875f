"""The Ray cluster of a job: joined when one is named, else started on this machine and stopped after the job."""

from __future__ import annotations

import gc
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import worker as ray_worker

from rlsys.config import ClusterSection, checked_address
from rlsys.errors import ClusterError
from rlsys.shell import variable

KNOCK_TIMEOUT_S = 10.0


@contextmanager
def cluster(section: ClusterSection) -> Iterator[str]:
    """Yields where the cluster is, in words. ``cluster.address`` beats RAY_ADDRESS."""
    address = checked_address(section.address or variable("RAY_ADDRESS"))
    # Ray prints every death of a worker in its own words; ours are told once, with their cause (actors/logs.py).
    ray_worker.print_to_stdstream = _said_elsewhere
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls whose answer nobody wants any more
    # Ray ends actors by a kill, after which sockets of engines and folders of fork servers would stay behind.
    with tempfile.TemporaryDirectory(prefix="rlsys-", ignore_cleanup_errors=True) as scratch:
        where = _join(address) if address else _start(section, scratch)
        try:
            yield where
        finally:
            _leave()


def _leave() -> None:
    """Stop what was started here, or disconnect from what was joined.

    Ray ends the process when a reference is let go of while it shuts down, and Python's garbage collector lets go of
    them in whatever thread it happens to run, such as that of wandb: it must not run meanwhile.
    """
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def _said_elsewhere(data: Any, ignore_prefix: bool) -> None:
    """In place of what Ray puts on the terminal."""


def _join(address: str) -> str:
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address!r} (cluster.address or RAY_ADDRESS): {str(error).splitlines()[0]}. "
            "Start one with `ray start --head`, or unset RAY_ADDRESS to have one started here for this job"
        ) from error
    return f"the Ray cluster at {address}"


def _knock(address: str) -> None:
    """Ask whether anything listens at a ``host:port``: ray.init alone was seen to wait minutes for nobody."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_TIMEOUT_S).close()


def _start(section: ClusterSection, scratch: str) -> str:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=section.num_cpus,
        object_store_memory=int(section.object_store_gb * 2**30),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        runtime_env={"env_vars": {"TMPDIR": scratch}},
    )
    return "a Ray cluster on this machine"


def threads_env(threads: int) -> dict[str, dict[str, str]]:
    """A runtime_env that fixes the threads of numerical libraries before they are loaded."""
    return {"env_vars": {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}}
