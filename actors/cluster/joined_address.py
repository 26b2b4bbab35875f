"""Decides whether this process joins a Ray cluster or starts Ray on this machine."""

from __future__ import annotations

from rlsys.config.key_types import checked_address
from rlsys.utils.env_variables import env_variable


def joined_address(given: str | None) -> str | None:
    """Address of the cluster to join: `given`, which is ``cluster.address``, or else RAY_ADDRESS. None, also for Ray's
    `local`: Ray is started here.

    Raises:
        ConfigError: it has not the shape of an address.
    """
    address = checked_address(given or env_variable("RAY_ADDRESS"))
    return None if address == "local" else address
