"""Where learner ranks meet."""

from __future__ import annotations

import socket

import ray


def meeting_point() -> str:
    """An address on this node with a port that is free now."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return f"tcp://{address}:{probe.getsockname()[1]}"
