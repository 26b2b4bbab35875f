"""Connects a job to its Ray cluster: joins the cluster at an address, or starts Ray on this machine for the job."""

from __future__ import annotations

import gc
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import worker as ray_worker
from ray.exceptions import AuthenticationError, RayError

from actors.cluster.connection import disconnect
from actors.cluster.joined_address import joined_address
from actors.cluster.local_ray import first_sentence, start
from actors.cluster.process_environment import check_process_environment
from rlsys.config import ClusterSection
from rlsys.errors import ClusterError
from rlsys.sampler.vllm_build import Device, refuse_other_torch, refuse_other_vllm
from rlsys.utils.env_variables import env_variable, set_default
from rlsys.utils.openmp import openmp_variables

KNOCK_TIMEOUT_S = 10.0
START = "Start one with `ray start --head`, or unset RAY_ADDRESS: the job then starts Ray on this machine"
REFUSED = ("unauthenticated", "authentication token", "token authentication", "invalid token", "authenticationerror")


@contextmanager
def cluster(section: ClusterSection) -> Iterator[str]:
    """Connect for the duration of the block; yields a description of the cluster. ``cluster.address`` takes precedence
    over RAY_ADDRESS.

    Raises:
        ClusterError: the environment is unusable, or the cluster cannot be joined.
    """
    address = joined_address(section.address)
    check_process_environment(starts_ray=not address)
    # Ray prints a message for every dead worker; rlsys reports each failure once, with its cause
    # (actors/faults/actor_logs.py).
    ray_worker.print_to_stdstream = _print_nothing
    set_default("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls whose result is no longer needed
    # Ray kills actors, which would leave the sockets of engines and the folders of fork servers behind.
    with tempfile.TemporaryDirectory(prefix="rlsys-", ignore_cleanup_errors=True) as scratch:
        where = _join(address) if address else start(section, scratch)
        try:
            yield where
        finally:
            _leave()


def refuse_other_builds(section: ClusterSection, sampler: Device, learner: Device) -> None:
    """Compare the installed builds with the configured devices, if Ray starts on this machine. On a joined cluster each
    actor makes the comparison on its node.

    Raises:
        ClusterError: vLLM or torch is built for another device.
    """
    if joined_address(section.address):
        return
    refuse_other_vllm(sampler)
    refuse_other_torch(learner)


def _leave() -> None:
    """Stop Ray if this process started it, or disconnect from the joined cluster.

    Ray aborts the process when an object reference is released during shutdown. Python's garbage collector releases
    references in any thread, such as wandb's, so it is disabled meanwhile.
    """
    gc.collect()
    gc.disable()
    try:
        disconnect()
    finally:
        gc.enable()


def _print_nothing(data: object, ignore_prefix: bool) -> None:
    """Replaces Ray's function that prints worker messages on the terminal."""


def _join(address: str) -> str:
    where = f"{address!r} (cluster.address or RAY_ADDRESS)"
    try:
        _knock(address)
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {where}: {first_sentence(error)}. {START}") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(why_not_joined(where, error)) from error
    return f"the Ray cluster at {address}"


def why_not_joined(where: str, error: BaseException) -> str:
    """Explain Ray's connection error and its remedy: wrong token, other version, no cluster, or another service."""
    chain, text = error, str(error)
    while (chain := chain.__cause__ or chain.__context__) is not None:  # type: ignore[assignment]
        text += f" {chain}"
    low = text.lower()
    if isinstance(error, AuthenticationError) or any(word in low for word in REFUSED):
        mode = env_variable("RAY_AUTH_MODE")
        now = f"RAY_AUTH_MODE is {mode!r} here" if mode else "RAY_AUTH_MODE is not set here"
        return (
            f"the Ray cluster at {where} refuses this process's token: {first_sentence(error)}. {now}. Set "
            "RAY_AUTH_MODE to the mode that the cluster was started with: disabled, or token with the cluster's token "
            "in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token"
        )
    if "version mismatch" in low or "versions don't match" in low:
        return (
            f"the Ray cluster at {where} has another version: {' '.join(text.split())[:300]}. Use the same Ray and "
            "Python on both sides (pip install 'ray[default]==VERSION'), or start a cluster from this environment"
        )
    if "could not find any running ray instance" in low or "'auto'" in low:
        return f"no Ray cluster answers at {where}: {first_sentence(error)}. {START}"
    tls = env_variable("RAY_USE_TLS") or "0"
    return (
        f"a process listens at {where}, but it does not answer like a Ray cluster: {first_sentence(error)}. Check the "
        "port (6379 unless changed with `ray start --head --port`; 8265 is the dashboard, which drivers cannot join), "
        f"TLS (RAY_USE_TLS is {tls!r} here, and must be the same on both sides), RAY_AUTH_MODE and the token"
    )


def _knock(address: str) -> None:
    """Connect to ``host:port`` to see whether a process listens there; ray.init alone was seen to wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_TIMEOUT_S).close()


def threads_env(threads: int | None) -> dict[str, dict[str, str]]:
    """Ray runtime_env that sets the thread count of numerical libraries before they are imported. None: 1."""
    return {"env_vars": openmp_variables(threads or 1)}
