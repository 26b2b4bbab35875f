"""Lists the nodes of a Ray cluster for `rlsys plan` and for placement."""

from __future__ import annotations

import ray

from actors.cluster.ray_cluster import cluster
from rlsys.config import ClusterSection
from rlsys.config.key_types import checked_address
from rlsys.planning.fit import Node


def nodes_at(address: str) -> list[Node]:
    """The nodes that are alive. Connects to the cluster, and disconnects afterwards.

    Raises:
        ClusterError: no cluster answers at the address.
    """
    with cluster(ClusterSection(address=checked_address(address))):
        return alive_nodes()


def alive_nodes() -> list[Node]:
    """Nodes of the connected cluster that are alive, with their resources and memory."""
    return [
        Node(
            node["NodeManagerAddress"],
            {name: amount for name, amount in node["Resources"].items() if name not in _SIZES},
            int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


_SIZES = ("memory", "object_store_memory")  # resources in bytes, which placement does not count
