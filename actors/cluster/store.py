"""The cluster's store of keys, which lives on Ray's head node: what processes of different jobs tell one another.

Each call has a time limit, for those who go on without an answer. `ray.experimental.internal_kv`, on the same keys,
has none.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError

from rlsys.errors import ClusterError

NAMESPACE = b"rlsys"
ANSWER_S = 3.0  # for one answer of the head node


def put(key: str, value: bytes) -> bool:
    """Add a key; false if it is there already."""
    return bool(_call("internal_kv_put", key.encode(), value, False, NAMESPACE))


def get(key: str) -> bytes | None:
    value: bytes | None = _call("internal_kv_get", key.encode(), NAMESPACE)
    return value


def delete(key: str) -> None:
    _call("internal_kv_del", key.encode(), False, NAMESPACE)


def delete_all(prefix: str) -> None:
    _call("internal_kv_del", prefix.encode(), True, NAMESPACE)


def keys(prefix: str) -> list[str]:
    return sorted(key.decode() for key in _call("internal_kv_keys", prefix.encode(), NAMESPACE))


def has_living_driver(job_id: str) -> bool:
    """Whether the driver of this job of Ray's is connected to the cluster."""
    skip = {"skip_submission_job_info_field": True, "skip_is_running_tasks_field": True}
    found = _call("get_all_job_info", job_or_submission_id=job_id, **skip)
    return any(not info.is_dead for info in found.values())


def _call(method: str, *arguments: object, **more: object) -> Any:
    """
    Raises:
        ClusterError: no answer in time.
    """
    try:
        return getattr(ray._private.worker.global_worker.gcs_client, method)(*arguments, timeout=ANSWER_S, **more)
    except RayError as error:
        raise ClusterError(f"Ray's head node: no answer within {ANSWER_S:g} s ({error})") from error
