"""The nodes of a Ray cluster as a plan reads them."""

from __future__ import annotations

import ray

from actors.cluster.ray_cluster import cluster
from rlsys.config import ClusterSection
from rlsys.config.key_types import checked_address
from rlsys.planning.plan import Node


def nodes_at(address: str) -> list[Node]:
    """Of a running cluster; joins it for a moment.

    Raises:
        ClusterError: nobody answers there.
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


_SIZES = ("memory", "object_store_memory")  # bytes, not places
