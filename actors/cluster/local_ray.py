"""Starts Ray on this machine for a job or a deployment of this process, with the processes that these use.

`ray.init` also starts a dashboard (`include_dashboard=False` leaves out its page alone), a log monitor, which copies
workers' output to drivers that ask for it, and an autoscaler. Each of these imports Ray, and so does each worker with a
runtime environment before it imports Ray for its work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import node as ray_node
from ray._private.parameter import RayParams

from actors.cluster import setup_worker
from actors.machine.gpus import gpus_for_ray
from rlsys.config import ClusterSection
from rlsys.errors import ClusterError
from rlsys.utils.env_variables import set_default


def start(section: ClusterSection, scratch: str) -> str:
    """Start Ray and connect to it. `scratch`: TMPDIR of its workers. Returns a description of the cluster.

    Raises:
        ClusterError: Ray did not start.
    """
    set_default("RAY_USAGE_STATS_ENABLED", "0")
    set_default("RAY_prestart_worker_first_driver", "0")  # most workers are forked, which these are not
    try:
        with _fewer_processes():
            ray.init(
                address="local",
                num_cpus=section.num_cpus,
                num_gpus=gpus_for_ray(),
                object_store_memory=int(section.object_store_gb * 2**30),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
                runtime_env={"env_vars": {"TMPDIR": scratch}},
            )
    except Exception as error:  # of many types: a bare one where Ray's processes are late
        raise ClusterError(why_not_started(error)) from error
    return "a Ray cluster on this machine"


def why_not_started(error: BaseException) -> str:
    """Explain why Ray did not start here, and what to do."""
    late = "timed out" in str(error)
    remedy = "on a loaded machine Ray's own limit is short, so run the command again. " if late else ""
    return (
        f"Ray did not start on this machine: {first_sentence(error)}; {remedy}Ray's logs are in session_latest/logs "
        "below RAY_TMPDIR or /tmp/ray"
    )


def first_sentence(error: BaseException) -> str:
    """Of an error message; Ray appends several lines of advice."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return said.partition(". ")[0].strip().rstrip(".")


class SmallNode(ray_node.Node):  # type: ignore[misc]  # Ray has no types
    """A head node of this process's own Ray. `ray.init` has no options for these (Ray 2.60)."""

    def __init__(self, ray_params: RayParams, **options: Any) -> None:
        ray_params.update(no_monitor=True, include_log_monitor=False, setup_worker_path=setup_worker.__file__)
        super().__init__(ray_params, **options)

    def start_api_server(self, **options: Any) -> None:
        """No dashboard."""


@contextmanager
def _fewer_processes() -> Iterator[None]:
    before = ray_node.Node
    ray_node.Node = SmallNode
    try:
        yield
    finally:
        ray_node.Node = before
