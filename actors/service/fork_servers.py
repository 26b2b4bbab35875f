"""Fork servers of deployments: one beside a Ray that a client starts, else those of `rlsys warm`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray._private.utils import get_num_cpus

from actors.cluster.joined_address import joined_address
from actors.forking.job_server import ForkServer, ServerAddress
from actors.forking.servers import warm_servers
from actors.machine.gpus import gpus_for_ray
from actors.service.placement import sections
from rlsys.client.config import ServiceConfig
from rlsys.config import LearnerSection, SamplerSection
from rlsys.errors import RlsysError

_beside: list[ForkServer] = []  # the server of the Ray that this process started, if it has one


class DeploymentServers:
    """Servers that the actors of one client's deployments can be forked from."""

    def __init__(self) -> None:
        self._noted: set[str] = set()

    def of(self, section: LearnerSection | SamplerSection) -> ServerAddress | None:
        """Address of the server for actors of this section, on a CPU and on a cluster of one node: on several, Ray
        chooses the node when the actor starts."""
        if section.device != "cpu":
            return None
        threads = section.threads or 1
        if _beside:
            return _beside[0].address if _beside[0].address.threads == threads else None
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        return warm_servers(self.note).servers.get((nodes[0], threads)) if len(nodes) == 1 else None

    def note(self, text: str) -> None:
        """Warn, once."""
        if text and text not in self._noted:
            self._noted.add(text)
            warnings.warn(text, stacklevel=2)


@contextmanager
def server_beside_ray(config: ServiceConfig) -> Iterator[None]:
    """Have a server for the block, which imports while Ray starts here, unless a cluster is joined, or actors have GPUs
    or different thread counts."""
    threads = None if joined_address(config.cluster.address) else _threads(config)
    if threads is not None:
        with suppress(OSError):  # of a temporary folder, which the start of Ray refuses by name
            _beside.append(ForkServer(threads))
    try:
        yield
    finally:
        while _beside:
            _beside.pop().close()


def _threads(config: ServiceConfig) -> int | None:
    """Of learner and samplers on this machine."""
    cpus = config.cluster.num_cpus or get_num_cpus()
    try:
        learner, sampler = sections(config, {"CPU": float(cpus), "GPU": float(gpus_for_ray() or 0)})
    except RlsysError:  # which the start of the deployment refuses
        return None
    if (learner.device, sampler.device) != ("cpu", "cpu") or (learner.threads or 1) != (sampler.threads or 1):
        return None
    return learner.threads or 1
