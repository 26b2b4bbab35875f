"""Joins the Ray cluster of a run from another process, as a process that the run's cluster takes in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlsys.config import ClusterSection
from rlsys.config.key_types import checked_address
from rlsys.run_state.run_info import INFO
from rlsys.utils.env_variables import env_variable


@contextmanager
def reach(run: str | None, address: str | None) -> Iterator[str | None]:
    """Join the Ray cluster of a run and yield the run's name. `run`: its name or directory.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    places = [Path(run), Path("runs") / run] if run else []
    folder = next((place for place in places if (place / INFO).is_file()), None)
    name = folder.name if folder else run
    where = address or env_variable("RAY_ADDRESS")
    if folder and not where:
        info = json.loads((folder / INFO).read_bytes())
        where = info.get("cluster")
        if info.get("auth_mode") and env_variable("RAY_AUTH_MODE") is None:
            os.environ["RAY_AUTH_MODE"] = info["auth_mode"]
    from actors.cluster.ray_cluster import cluster  # Ray reads RAY_AUTH_MODE when it is imported, and not again

    with cluster(ClusterSection(address=checked_address(where) or "auto")):
        yield name
