"""Lists the nodes of a Ray cluster for `rlsys plan`."""

from __future__ import annotations

import ray

from actors.cluster.ray_cluster import cluster
from rlsys.config import ClusterSection
from rlsys.config.key_types import checked_address
from rlsys.planning.plan import Node


def nodes_at(address: str) -> list[Node]:
    """Nodes that are alive, with their resources and memory. Connects to the cluster, and disconnects afterwards.

    Raises:
        ClusterError: no cluster answers at the address.
    """
    with cluster(ClusterSection(address=checked_address(address))):
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
