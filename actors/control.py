"""Requests to a running job (`rlsys scale`, `rlsys stop`): a named actor holds them until the driver reads them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from actors.cluster.ray_cluster import cluster
from actors.control_actor import JobControl
from actors.faults.actor_calls import wait
from actors.forking.servers import NO_SERVERS, ForkServers, on_driver_node
from rlsys.config import ClusterSection
from rlsys.config.key_types import checked_address
from rlsys.errors import ClusterError, ConfigError, RlsysError
from rlsys.run_state.run_info import INFO
from rlsys.utils.env_variables import env_variable
from rlsys.utils.shell_paths import command

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NAMESPACE = "rlsys"
PREFIX = "job:"
RELEASE_S, RELEASE_POLL_S = 15.0, 0.5
ANSWER_TIMEOUT_S = 120.0  # the driver reads requests between its calls; only training a base from scratch takes longer


class Control:
    """The driver's end of JobControl: reads requests and answers them with `handlers`."""

    def __init__(
        self, run: str, handlers: Mapping[str, Callable[[int | None], str]], servers: ForkServers = NO_SERVERS
    ) -> None:
        """
        Raises:
            ClusterError: a job of this name is already running on the cluster.
        """
        self.handlers = handlers
        # Without a runtime_env the actor takes a worker that Ray keeps idle, where there is one.
        has_environment = bool(ray.get_runtime_context().runtime_env)
        self.actor = _register(run, servers.driver_node_options() if has_environment else on_driver_node())
        self._next = self.actor.next.remote()

    def listen(self) -> None:
        """Answer all requests received since the last call. Does not block."""
        while ray.wait([self._next], timeout=0)[0]:
            try:
                number, kind, about = ray.get(self._next)
            except RayActorError:  # Ray restarts the actor; requests that it held have failed at their callers
                self._next = self.actor.next.remote()
                return
            text, failure = "", None
            try:
                text = self.handlers[kind](about)
            except RlsysError as error:
                failure = error
            self.actor.answer.remote(number, text, failure)
            self._next = self.actor.next.remote()

    def close(self) -> None:
        ray.kill(self.actor)


def _register(run: str, options: Mapping[str, Any]) -> ActorHandle:
    """Create the named actor. Retries for RELEASE_S: the name of a killed driver's actor is freed with a delay."""
    deadline = time.monotonic() + RELEASE_S
    while True:
        try:
            named = ray.remote(JobControl).options(name=PREFIX + run, namespace=NAMESPACE, max_restarts=-1, **options)
            return named.remote()
        except ValueError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"a job named {run!r} is already running on this cluster; choose another run.name, or stop the "
                    f"running job with `{command('rlsys', 'stop', run)}`"
                ) from error
            time.sleep(RELEASE_POLL_S)


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
    with cluster(ClusterSection(address=checked_address(where) or "auto")):
        yield name


def ask(run: str, kind: str, about: int | None) -> str:
    """Send a request to the driver of a running job and return its answer.

    Raises:
        ConfigError: no job of that name is running on this cluster.
        RlsysError: the driver refused the request.
    """
    try:
        actor = ray.get_actor(PREFIX + run, namespace=NAMESPACE)
    except ValueError:
        raise ConfigError(f"no running job is named {run!r} on this cluster{_known()}") from None
    answer: str = wait(actor.ask.remote(kind, about), ANSWER_TIMEOUT_S, f"job {run!r}: answering {kind!r}")
    return answer


def running() -> list[str]:
    """Names of the jobs running on this cluster."""
    return sorted(
        actor["name"].removeprefix(PREFIX)
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX)
    )


def _known() -> str:
    names = running()
    return f"; running: {', '.join(names)}" if names else "; no job is running there"
