"""Decides whether workers fit on nodes by their Ray resources: in total, each on one node, and all at once.

`rlsys plan` lists the shortfalls of a job, a starting job is refused with the first one, and a deployment is compared
with the free resources of its cluster. Memory is not a resource here: rlsys/planning/plan.py predicts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlsys.config import JobConfig, LearnerSection, SamplerSection

NODE_SHARE = 1e-3  # of Ray's resource "node:<address>", of which each node has 1
ROUNDING = 1e-6  # error of a sum of fractions; Ray counts in units of 1e-4
NODE = "node:"
# Resources that are no countable devices: Ray's labels, sizes in bytes, and copies held by placement groups.
UNCOUNTED = (NODE, "memory", "object_store_memory", "accelerator_type", "bundle_group")

Resources = Mapping[str, float]  # name -> amount


@dataclass(frozen=True, slots=True)
class Node:
    """One machine as Ray sees it. `gpu_memory`: bytes of its smallest GPU; None if not known."""

    name: str
    resources: Resources
    memory: int  # bytes
    gpu_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Needs of one placement group: a bundle of resources for each worker, which one node has to hold."""

    worker: str
    workers: str  # plural of `worker`
    bundles: tuple[Resources, ...]
    strategy: str


@dataclass(frozen=True, slots=True)
class Shortage:
    """A resource of which more is needed than there is."""

    resource: str
    needed: float
    found: float

    @property
    def missing(self) -> float:
        return self.needed - self.found

    def __str__(self) -> str:
        return f"{self.needed:g} {self.resource} needed, {self.found:g} found, {self.missing:g} too few"


def needs(section: LearnerSection | SamplerSection, index: int) -> dict[str, float]:
    """Ray resources that learner rank or sampler number `index` requests from its node."""
    found = {"CPU": section.num_cpus, "GPU": section.num_gpus, **section.resources}
    if section.nodes:
        found[f"{NODE}{section.nodes[index % len(section.nodes)]}"] = NODE_SHARE
    return {name: amount for name, amount in found.items() if amount > 0}


def groups(config: JobConfig) -> tuple[Group, ...]:
    """Placement groups of a job: of its learner ranks and of its samplers, or one of pairs that share their bundle."""
    learner, sampler = config.learner, config.sampler
    ranks = tuple(needs(learner, i) for i in range(learner.num_workers))
    samplers = tuple(needs(sampler, i) for i in range(sampler.num_workers))
    if sampler.colocate:  # a learner rank and its sampler share one bundle, and use the GPU in turn
        pairs = tuple(sum_resources(pair) for pair in zip(ranks, samplers, strict=True))
        pair, plural = "learner rank with its sampler", "learner ranks with their samplers"
        return (Group(pair, plural, pairs, learner.placement),)
    return (
        Group("learner rank", "learner ranks", ranks, learner.placement),
        Group("sampler", "samplers", samplers, sampler.placement),
    )


def sum_resources(parts: Iterable[Resources]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            found[name] = found.get(name, 0.0) + amount
    return found


def fits(needed: Resources, has: Resources) -> bool:
    return next(shortages(needed, has), None) is None


def shortages(needed: Resources, has: Resources) -> Iterator[Shortage]:
    for name, amount in needed.items():
        if amount > has.get(name, 0.0) + ROUNDING:
            yield Shortage(name, amount, has.get(name, 0.0))


def packs(bundles: Iterable[Resources], nodes: Iterable[Node]) -> bool:
    """Whether first-fit decreasing places all bundles. It can miss a placement that needs another order."""
    free = [dict(node.resources) for node in nodes]
    for bundle in sorted(bundles, key=_size, reverse=True):
        room = next((has for has in free if fits(bundle, has)), None)
        if room is None:
            return False
        for name, amount in bundle.items():
            room[name] -= amount
    return True


def job_shortfalls(config: JobConfig, nodes: Sequence[Node]) -> Iterator[str]:
    """Why nodes could not hold a job even if they were idle: each shortfall with the keys that ask for it.

    Every shortfall is certain. A job without one can still be too much for its nodes: see `packs`.
    """
    wanted = groups(config)
    short = list(_shortfalls_in_total(config, wanted, nodes))
    yield from short
    if not short:
        for group in wanted:
            yield from _shortfalls_of_group(group, nodes)


def _shortfalls_in_total(config: JobConfig, wanted: Iterable[Group], nodes: Sequence[Node]) -> Iterator[str]:
    needed = sum_resources(bundle for group in wanted for bundle in group.bundles)
    for shortage in shortages(needed, sum_resources(node.resources for node in nodes)):
        if shortage.resource.startswith(NODE) and shortage.found == 0:
            address, known = shortage.resource.removeprefix(NODE), ", ".join(node.name for node in nodes)
            yield f"learner.nodes, sampler.nodes: found no node {address!r}; nodes are {known}"
        else:
            yield _shortfall(config, shortage)


def _shortfall(config: JobConfig, shortage: Shortage) -> str:
    learner, sampler = config.learner, config.sampler
    name, found = shortage.resource, shortage.found
    key = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(name, "resources")
    each = (needs(learner, 0).get(name, 0.0), needs(sampler, 0).get(name, 0.0))
    text = (
        f"{shortage}: learner.num_workers {learner.num_workers} x learner.{key} {each[0]:g} + "
        f"sampler.num_workers {sampler.num_workers} x sampler.{key} {each[1]:g}"
    )
    workers = learner.num_workers + sampler.num_workers
    if name == "CPU" and found > 0:
        share = math.floor(found / workers * 100) / 100
        return f"{text}. Fractions of a core are allowed: learner.num_cpus={share:g} sampler.num_cpus={share:g}"
    if name == "GPU" and found == 0:
        return f"{text}. Without GPUs: learner.num_gpus=0 sampler.num_gpus=0"
    return f"{text}. Request less, or join a larger cluster (cluster.address)"


def _shortfalls_of_group(group: Group, nodes: Sequence[Node]) -> Iterator[str]:
    """Bundles that no node holds, and strategies that the nodes cannot follow."""
    largest = amounts(max(nodes, key=lambda node: _size(node.resources)).resources)
    for bundle in group.bundles:
        if not any(fits(bundle, node.resources) for node in nodes):
            yield f"no single node can hold one {group.worker}, which needs {amounts(bundle)}; largest: {largest}"
            break
    if group.strategy == "STRICT_SPREAD" and len(group.bundles) > len(nodes):
        yield (
            f"{group.worker}: placement STRICT_SPREAD needs {len(group.bundles)} nodes, found {len(nodes)}; use "
            f"SPREAD, or num_workers={len(nodes)}"
        )
    together = sum_resources(group.bundles)
    if group.strategy == "STRICT_PACK" and not any(fits(together, node.resources) for node in nodes):
        yield (
            f"{group.worker}: placement STRICT_PACK needs {amounts(together)} on one node; largest node: {largest}; "
            "use PACK"
        )


def amounts(resources: Resources) -> str:
    """Text of countable resources: ``2 CPU, 1 GPU``."""
    shown = {
        name: amount for name, amount in resources.items() if not name.startswith(UNCOUNTED) and "_group_" not in name
    }
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"


def _size(resources: Resources) -> tuple[float, float]:
    return resources.get("GPU", 0.0), resources.get("CPU", 0.0)
