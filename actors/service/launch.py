"""Starts and ends the actors of a deployment. Their names in Ray make sure that there is one of each."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from actors.forking.servers import forked_learner, forked_sampler, imports_by_itself
from actors.service.call_futures import future_of
from actors.service.fork_servers import DeploymentServers
from actors.service.learner_service import ServiceLearner
from actors.service.placement import actor_options
from actors.service.sampler_service import ServiceSampler
from rlsys.architectures.precision import rounding_note
from rlsys.client.backend import About
from rlsys.client.config import DeploymentSpec
from rlsys.config.gpu_shares import may_share, start_in_order
from rlsys.errors import StalledError

NAMESPACE = "rlsys"
ASK_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
MANY_CALLS = 10_000  # concurrent calls of an actor: a call that waits for its turn must not block the call before it
NAME_POLL_S = 0.2  # Ray frees the name of a dead actor after a moment


def key_of(source: str) -> str:
    """Of a base, in the names of its actors."""
    return hashlib.blake2b(source.encode(), digest_size=6).hexdigest()


def resolved(source: str) -> str:
    return os.path.abspath(source) if Path(source).is_dir() else source


def learner_name(key: str) -> str:
    return f"learner/{key}"


def sampler_name(key: str, index: int) -> str:
    return f"sampler/{key}/{index}"


def launch_learner(spec: DeploymentSpec, servers: DeploymentServers, *, alone: bool = False) -> ActorHandle:
    """Get the learner actor of this name, or start it; `alone`: only start it. It starts the other ranks.

    Raises:
        ValueError: `alone`, and there is one.
    """
    server = servers.of(spec.host.learner)
    options = _named(spec, learner_name(spec.key)) | forked_learner(actor_options(spec.host.learner, 0), server)
    options["get_if_exists"] = not alone
    return ray.remote(ServiceLearner).options(**options).remote(spec, server)


def launch_sampler(spec: DeploymentSpec, index: int, servers: DeploymentServers) -> ActorHandle:
    section = spec.engine.section
    forked = forked_sampler(actor_options(section, index), servers.of(section))
    options = _named(spec, sampler_name(spec.key, index)) | forked
    return ray.remote(ServiceSampler).options(**options).remote(spec.engine, index)


def another(name: str, dead: ActorHandle | None, launch: Callable[[], ActorHandle], limit_s: float) -> ActorHandle:
    """The actor that `launch` gets or starts in the place of `dead`.

    Raises:
        StalledError: Ray did not free the name within the limit, or nobody started the actor.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            found = launch()
        except ValueError:  # no actor of this name, or it ended at this moment
            found = dead
        if found is not None and (dead is None or found._actor_id != dead._actor_id):
            return found
        if time.monotonic() > deadline:
            raise StalledError(f"{name}: no actor took the place of the dead one within {limit_s:g} s")
        time.sleep(NAME_POLL_S)


def brought_up(
    spec: DeploymentSpec, learner: ActorHandle, samplers: Sequence[ActorHandle], note: Callable[[str], None]
) -> About:
    """Load the base in all actors, and have every sampler prove that adapters reach its forward pass. `note` says why
    an actor's process was not forked although its node has a fork server, and which CPU computes in another dtype."""
    deadline = time.monotonic() + spec.start_timeout_s
    preloading = [(sampler, future_of(sampler.preload.remote(), "sampler: loading vLLM")) for sampler in samplers]
    loading = future_of(learner.start.remote(), "learner: loading the base")
    starting = []

    def begin_engines() -> None:
        for sampler, preloaded in preloading:
            preloaded.result(deadline - time.monotonic())
            starting.append(future_of(sampler.start.remote(), "sampler: starting vLLM"))

    shared = may_share(spec.host.learner, spec.engine.section)
    start_in_order(shared, lambda: loading.result(deadline - time.monotonic()), begin_engines)
    about: About = loading.result()
    for started in starting:
        started.result(deadline - time.monotonic())
    probe = learner.probe.remote()
    proofs = [future_of(sampler.prove.remote(probe), "sampler: proving its adapters") for sampler in samplers]
    for proof in proofs:
        proof.result(deadline - time.monotonic())
    told = [future_of(actor.started_as.remote(), "actor: telling how it started") for actor in (learner, *samplers)]
    future_of(learner.announce.remote(), "learner: opening").result(ASK_TIMEOUT_S)
    cpus = ["the learner's CPU", *(f"the CPU of sampler {index}" for index in range(len(samplers)))]
    for cpu, (why, computed) in zip(cpus, [each.result(ASK_TIMEOUT_S) for each in told], strict=True):
        if why:
            note(imports_by_itself(why))
        if computed != spec.engine.model.dtype:
            note(rounding_note(cpu, spec.engine.model.dtype, computed))
    return about


def end(actors: Sequence[ActorHandle]) -> None:
    """Ask the actors to stop, so that engines shut down cleanly; after STOP_TIMEOUT_S kill them all."""
    stopping = [actor.stop.remote() for actor in actors]
    ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S) if stopping else None
    for actor in actors:
        ray.kill(actor)


def note_stop(key: str, *, stopped: bool) -> None:
    """Note in the cluster whether the deployment was stopped on purpose: then no client replaces its actors."""
    if stopped:
        _internal_kv_put(_stop_note(key), b"1", namespace=NAMESPACE)
    else:
        _internal_kv_del(_stop_note(key), namespace=NAMESPACE)


def was_stopped(key: str) -> bool:
    return _internal_kv_get(_stop_note(key), namespace=NAMESPACE) is not None


def _stop_note(key: str) -> str:
    return f"stopped/{key}"


def find(name: str) -> ActorHandle | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def running_learners() -> dict[str, ActorHandle]:
    """By the key of their base."""
    found = {name.removeprefix("learner/"): find(name) for name in _names("learner/")}
    return {key: actor for key, actor in found.items() if actor is not None}


def running_samplers(key: str) -> list[ActorHandle]:
    """Those that can be found, in no order."""
    found = [find(name) for name in _names(f"sampler/{key}/")]
    return [actor for actor in found if actor is not None]


def _named(spec: DeploymentSpec, name: str) -> dict[str, Any]:
    options = {"name": name, "namespace": NAMESPACE, "max_concurrency": MANY_CALLS, "get_if_exists": True}
    return options | ({} if spec.host.detached is None else {"lifetime": "detached"})


def _names(prefix: str) -> list[str]:
    """Names of this namespace's actors that begin with `prefix`."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)
    )
