"""The Ray cluster of a job: joined when one is named, else started on this machine and stopped after the job."""

from __future__ import annotations

import math
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from rlsys.config import ClusterSection, JobConfig, LearnerSection, SamplerSection
from rlsys.errors import ClusterError

# Rewards and advantages run while learner and sampler wait, so they hold no core of their own.
LIGHT = {"num_cpus": 0}
KNOCK_TIMEOUT_S = 10.0


@contextmanager
def cluster(section: ClusterSection) -> Iterator[str]:
    """Yields where the cluster is, in words. ``cluster.address`` beats RAY_ADDRESS."""
    address = section.address or os.environ.get("RAY_ADDRESS")
    # Ray ends actors by a kill, after which sockets of engines and folders of fork servers would stay behind.
    with tempfile.TemporaryDirectory(prefix="rlsys-", ignore_cleanup_errors=True) as scratch:
        where = _join(address) if address else _start(section, scratch)
        try:
            yield where
        finally:
            ray.shutdown()  # stops what was started here; only disconnects from what was joined


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


def refuse_shortfall(config: JobConfig) -> None:
    """Compare what the job asks for with what the cluster has, before any actor could wait for it in silence.

    Raises:
        ClusterError: the shortfall, and the keys that ask for it.
    """
    learner, sampler, workers = _needs(config.learner), _needs(config.sampler), config.sampler.num_workers
    has = ray.cluster_resources()
    for resource, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        asked, found = learner[resource] + workers * sampler[resource], has.get(resource, 0.0)
        if asked > found:
            raise ClusterError(
                f"job asks for {asked:g} {resource}s, the cluster has {found:g}: learner.{key} {learner[resource]:g}"
                f" + sampler.num_workers {workers} x sampler.{key} {sampler[resource]:g}. Ask for less (parts of a core"
                " are allowed: sampler.num_cpus=0.5), or join a larger cluster"
            )
    for who, needs in (("learner", learner), ("sampler", sampler)):
        if not any(_fits(needs, node["Resources"]) for node in ray.nodes() if node["Alive"]):
            raise ClusterError(f"no node of the cluster can hold one {who}, which asks for {needs}")


def threads_env(threads: int) -> dict[str, dict[str, str]]:
    """A runtime_env that fixes the threads of numerical libraries before they are loaded."""
    return {"env_vars": {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}}


def _needs(section: LearnerSection | SamplerSection) -> dict[str, float]:
    return {"CPU": section.num_cpus, "GPU": section.num_gpus}


def _fits(needs: Mapping[str, float], has: Mapping[str, float]) -> bool:
    return all(math.isclose(amount, 0.0) or has.get(name, 0.0) >= amount for name, amount in needs.items())
