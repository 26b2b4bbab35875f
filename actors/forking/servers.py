"""The fork servers that a job can use, by node, and the options of actors that are forked from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.column_refs import by_reference
from actors.cluster.placement import Slot
from actors.forking.checks import fingerprint
from actors.forking.job_server import ForkServer, ServerAddress
from actors.forking.warm import Addresses, addresses, end, launch, running
from rlsys.config import JobConfig

# Of a runtime_env: these leave the node's Python as it is.
PLAIN = {"env_vars", "working_dir", "py_modules", "excludes", "config", "_ray_commit"}


@dataclass(frozen=True, slots=True)
class ForkServers:
    """`may_start`: whether the job can have servers of its own beside these."""

    servers: Addresses = field(default_factory=dict)
    may_start: bool = False
    _noted: set[str] = field(default_factory=set)

    @contextmanager
    def for_slots(self, slots: Sequence[Slot], note: Callable[[str], None]) -> Iterator[None]:
        """Start servers for the block, one on each node that has none and holds two or more of the slots: actors there
        would import the same modules, each by itself."""
        wanted = Counter((slot.node, slot.threads) for slot in slots) if self.may_start else Counter()
        places = [(node, threads) for (node, threads), count in wanted.items() if node and count > 1]
        started = {place: launch(*place) for place in places if place not in self.servers}
        try:
            self.servers.update(_of_this_code(addresses(started, START_S, note), note))
            yield
        finally:
            for place in started:
                self.servers.pop(place, None)
            end(list(started.values()))

    def learner_options(self, slot: Slot) -> dict[str, Any]:
        """Ray's options of a learner, whose worker is forked if the slot's node has a server."""
        return forked_learner(slot.ray_options(), self._server(slot))

    def sampler_options(self, slot: Slot) -> dict[str, Any]:
        """Ray's options of a sampler, whose worker and host process are forked if the slot's node has a server."""
        return forked_sampler(by_reference(slot.ray_options()), self._server(slot))

    def driver_node_options(self) -> dict[str, Any]:
        """Ray's options of an actor without a core on the driver's node: it works while learner and samplers wait, and
        its results are needed as long as the driver lives. Its worker is forked if the node has a server."""
        options = by_reference(on_driver_node())
        here = ray.get_runtime_context().get_node_id()
        server = next((server for (node, _), server in self.servers.items() if node == here), None)
        return options if server is None else with_runtime(options, py_executable=server.worker_command("actor"))

    def note_unforked(self, reasons: Sequence[str], note: Callable[[str], None]) -> None:
        """Tell once per reason why processes started the ordinary, slower way."""
        for reason in sorted({*reasons} - {"", *self._noted}):
            self._noted.add(reason)
            note(imports_by_itself(reason))

    def _server(self, slot: Slot) -> ServerAddress | None:
        return self.servers.get((slot.node or "", slot.threads)) if self.servers else None


START_S = 60.0  # for Ray's worker that starts a server; without it the job's actors import by themselves
NO_SERVERS = ForkServers()


def on_driver_node() -> dict[str, Any]:
    """Ray's options of an actor without a core on the driver's node. (Ray 2.60 ignores soft affinity for these.)"""
    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def fork_servers(own: ForkServer | None, config: JobConfig, note: Callable[[str], None]) -> ForkServers:
    """Of the connected cluster: the job's own server, or those of `rlsys warm`. Jobs on CUDA use none."""
    if own is not None:
        threads = {config.learner.threads or 1, config.sampler.threads or 1}
        if threads != {own.address.threads}:
            note(imports_by_itself(f"threads: {sorted(threads)} in the run, {own.address.threads} in the server"))
        return ForkServers({(ray.get_runtime_context().get_node_id(), own.address.threads): own.address})
    if (config.learner.device, config.sampler_device) != ("cpu", "cpu"):
        return NO_SERVERS
    found = warm_servers(note)
    return ForkServers(found.servers, may_start=not _other_environment())


def warm_servers(note: Callable[[str], None]) -> ForkServers:
    """Those of `rlsys warm` on the connected cluster that can be used from here; `note` says why others cannot."""
    found = running(note)
    if not found:
        return NO_SERVERS
    if other := _other_environment():
        note(f"rlsys: the cluster's warm servers are not used: this process has the runtime_env {', '.join(other)}")
        return NO_SERVERS
    return ForkServers(_of_this_code(found, note, "; renew them with `rlsys warm --stop` and `rlsys warm`"))


def _of_this_code(found: Addresses, note: Callable[[str], None], remedy: str = "") -> Addresses:
    code = fingerprint()
    same = {where: server for where, server in found.items() if server.fingerprint == code}
    if len(same) < len(found):
        note(
            f"rlsys: {len(found) - len(same)} of {len(found)} fork servers hold other code or another Python than this "
            f"process and are not used{remedy}"
        )
    return same


def _other_environment() -> list[str]:
    """What of this process's runtime_env changes the Python of its actors."""
    return sorted({*ray.get_runtime_context().runtime_env} - PLAIN)


def forked_learner(options: dict[str, Any], server: ServerAddress | None) -> dict[str, Any]:
    """An actor's options, its worker forked with the learner's imports."""
    return options if server is None else with_runtime(options, py_executable=server.worker_command("learner"))


def forked_sampler(options: dict[str, Any], server: ServerAddress | None) -> dict[str, Any]:
    """An actor's options, its worker and its host process forked."""
    if server is None:
        return options
    return with_runtime(options, env_vars=server.variables(), py_executable=server.worker_command("actor"))


def imports_by_itself(reason: str) -> str:
    return f"rlsys: a process was not forked from the node's fork server and imports by itself: {reason}"


def with_runtime(options: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """An actor's options with more of its runtime_env."""
    runtime = dict(options.get("runtime_env", {}))
    if "env_vars" in more:
        more["env_vars"] = {**runtime.get("env_vars", {}), **more["env_vars"]}
    return {**options, "runtime_env": {**runtime, **more}}
