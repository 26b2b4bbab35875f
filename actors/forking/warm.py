"""Fork servers on the nodes of a Ray cluster, an actor for each: those that it keeps for the jobs that join it (`rlsys
warm`), and those that a job starts for itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.faults.actor_calls import wait
from actors.forking.job_server import ForkServer, ServerAddress

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NAMESPACE, PREFIX = "rlsys", "warm:"
READY_S = 300.0  # imports on a loaded node with cold disks
ASK_S = 2.0  # a job does without servers that do not say in time where they are
STOP_S = 10.0
# Ray's workers lower their priority once they run, and ask for what they are forked to be before that.
USUAL_PRIORITY = {"RAY_worker_niceness": "0"}


Addresses = dict[tuple[str, int], ServerAddress]  # by hex id of the node, and threads


@dataclass(frozen=True, slots=True)
class Held:
    """What a node's server has in memory."""

    node: str  # address
    threads: int
    processes: tuple[int, ...]
    memory_bytes: int
    found: bool = False  # it ran before


class WarmServer:
    """Actor that owns its node's fork server, and ends with it."""

    def __init__(self, threads: int, idle_s: float) -> None:
        self.threads = threads
        self.server = ForkServer(threads, idle_s, first_environment())
        threading.Thread(target=self._end_with_server, daemon=True).start()

    def address(self) -> ServerAddress:
        return self.server.address

    def held(self) -> Held:
        """Answers once everything is imported."""
        self.server.wait_until_ready(READY_S)
        pids = self.server.processes()
        memory = sum(psutil.Process(pid).memory_full_info().pss for pid in pids)
        return Held(ray.util.get_node_ip_address(), self.threads, tuple(pids), memory)

    def stop(self) -> None:
        self.server.close()

    def _end_with_server(self) -> None:
        self.server.wait()
        os._exit(0)


def first_environment() -> dict[str, str]:
    """What Ray started this process with, and starts other workers with: without what it has set since."""
    pairs = Path("/proc/self/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)


def start(threads: int, idle_s: float) -> Iterator[Held]:
    """A server on each node of the connected cluster that has none with this thread count."""
    before = {name for name, _ in _named()}
    actors = []
    for node in ray.nodes():
        if node["Alive"]:
            name = f"{PREFIX}{node['NodeID']}:{threads}"
            kept = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
            actors.append((name, node["NodeManagerAddress"], launch(node["NodeID"], threads, idle_s, **kept)))
    for name, address, actor in actors:
        held: Held = wait(actor.held.remote(), READY_S, f"warm server on {address}: importing")
        yield Held(held.node, held.threads, held.processes, held.memory_bytes, name in before)


def launch(node: str, threads: int, idle_s: float = 0.0, **options: object) -> ActorHandle:
    """The actor of a server on a node. `options`: Ray's."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    place: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": USUAL_PRIORITY}, "scheduling_strategy": where}
    return ray.remote(WarmServer).options(**place, **options).remote(threads, idle_s)


def stop() -> int:
    """End all servers of the connected cluster; processes that they forked live on. Returns how many there were."""
    found = [actor for _, actor in _named()]
    end(found)
    return len(found)


def end(actors: Sequence[ActorHandle]) -> None:
    """End servers and their actors; processes that they forked live on."""
    stopping = [actor.stop.remote() for actor in actors]
    ray.wait(stopping, num_returns=len(stopping), timeout=STOP_S) if stopping else None
    for actor in actors:
        ray.kill(actor)


def running(note: Callable[[str], None]) -> Addresses:
    """Addresses of the connected cluster's servers."""
    actors = {}
    for name, actor in _named():
        node, threads = name.removeprefix(PREFIX).split(":")
        actors[node, int(threads)] = actor
    return addresses(actors, ASK_S, note)


def addresses(
    actors: Mapping[tuple[str, int], ActorHandle], timeout_s: float, note: Callable[[str], None]
) -> Addresses:
    """Addresses of the servers of these actors; `note` says which have none."""
    asked = {actor.address.remote(): where for where, actor in actors.items()}
    if not asked:
        return {}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    found = {}
    for ref in ready:
        try:
            found[asked[ref]] = ray.get(ref)
        except RayError as error:
            note(f"rlsys: the fork server of node {asked[ref][0][:8]} is not used: {str(error).splitlines()[0]}")
    for ref in late:
        note(f"rlsys: the fork server of node {asked[ref][0][:8]} has not answered within {timeout_s:g} s, so not used")
    return found


def _named() -> Iterator[tuple[str, ActorHandle]]:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX):
            try:
                yield actor["name"], ray.get_actor(actor["name"], namespace=NAMESPACE)
            except ValueError:
                continue  # it has just ended
