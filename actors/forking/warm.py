"""Fork servers that a Ray cluster keeps for the jobs that join it (`rlsys warm`): one detached actor per node."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
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
            options: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
            options["runtime_env"] = {"env_vars": USUAL_PRIORITY}
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            actor = ray.remote(WarmServer).options(get_if_exists=True, **options).remote(threads, idle_s)
            actors.append((name, node["NodeManagerAddress"], actor))
    for name, address, actor in actors:
        held: Held = wait(actor.held.remote(), READY_S, f"warm server on {address}: importing")
        yield Held(held.node, held.threads, held.processes, held.memory_bytes, name in before)


def stop() -> int:
    """End all servers of the connected cluster; processes that they forked live on. Returns how many there were."""
    found = list(_named())
    stopping = [actor.stop.remote() for _, actor in found]
    ray.wait(stopping, num_returns=len(stopping), timeout=STOP_S) if stopping else None
    for _, actor in found:
        ray.kill(actor)
    return len(found)


def running(note: Callable[[str], None]) -> dict[tuple[str, int], ServerAddress]:
    """Addresses of the connected cluster's servers, by node and thread count."""
    asked = {actor.address.remote(): name for name, actor in _named()}
    if not asked:
        return {}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S)
    found = {}
    for ref in ready:
        node, threads = asked[ref].removeprefix(PREFIX).split(":")
        try:
            found[node, int(threads)] = ray.get(ref)
        except RayError as error:
            note(f"rlsys: the warm server of node {node[:8]} is not used: {str(error).splitlines()[0]}")
    for ref in late:
        note(f"rlsys: {asked[ref]} has not answered within {ASK_S:g} s and is not used")
    return found


def _named() -> Iterator[tuple[str, ActorHandle]]:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX):
            try:
                yield actor["name"], ray.get_actor(actor["name"], namespace=NAMESPACE)
            except ValueError:
                continue  # it has just ended
