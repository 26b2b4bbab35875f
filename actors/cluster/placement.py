"""Placement of a job's actors: reserved as placement groups before any actor starts, or refused with the shortfall."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.ray_cluster import threads_env
from rlsys.config import JobConfig, LearnerSection, SamplerSection, gpu_shares
from rlsys.errors import ClusterError, StalledError
from rlsys.planning.plan import needs

POLL_S = 0.2
NOTED_AFTER_S = 5.0  # of waiting for resources that others hold
ROOM_S = 10.0  # limit for one more sampler, whose resources are free already

Needs = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Slot:
    """Reserved resources for one actor."""

    group: PlacementGroup
    bundle: int
    options: Mapping[str, Any]  # what the actor itself takes of the bundle

    def ray_options(self) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundle)
        return {**self.options, "scheduling_strategy": strategy}


class Placement:
    """The placement groups of one job; released when it ends."""

    def __init__(self, config: JobConfig, note: Callable[[str], None]) -> None:
        self.config, self.note = config, note
        self._groups: list[PlacementGroup] = []

    def reserve(self) -> tuple[list[Slot], list[Slot]]:
        """Slots of the learner's ranks and of the samplers.

        Raises:
            ClusterError: the cluster could not hold them even if it were idle.
            StalledError: others hold the resources for longer than watchdog.stages.start.
        """
        refuse_shortfall(self.config)
        learner, sampler = self.config.learner, self.config.sampler
        ranks = [needs(learner, i) for i in range(learner.num_workers)]
        if sampler.colocate:
            pairs = [_together(rank, needs(sampler, i)) for i, rank in enumerate(ranks)]
            group = self._group(pairs, learner.placement, "learner ranks with their samplers")
            return _slots(group, learner, ranks), _slots(group, sampler, ranks)
        samplers = [needs(sampler, i) for i in range(sampler.num_workers)]
        of_learner = self._group(ranks, learner.placement, "learner ranks")
        of_samplers = self._group(samplers, sampler.placement, "samplers")
        return _slots(of_learner, learner, ranks), _slots(of_samplers, sampler, samplers)

    def another_sampler(self, index: int) -> Slot:
        """A slot for a sampler beyond those of `reserve`; raises as `reserve`."""
        section = self.config.sampler
        wanted = [needs(section, index)]
        if gpu_shares.stacked(section.num_gpus):
            raise ClusterError(
                f"no room for one more sampler: with sampler.num_gpus {section.num_gpus:g} Ray may put it on the GPU "
                "of another, where each engine takes the other's memory for its own; set sampler.num_gpus=1"
            )
        if not any(_fits(wanted[0], node["Resources"]) for node in _alive()):
            raise ClusterError(
                f"no node of the cluster can hold one more sampler, which asks for {_resources(wanted[0])}"
            )
        free = ray.available_resources()
        short = [f"{name}: asks for {n:g}, {free.get(name, 0.0):g} free" for name, n in wanted[0].items()
                 if free.get(name, 0.0) < n]  # fmt: skip
        if short:
            raise ClusterError(f"no room for one more sampler now: {'; '.join(short)}")
        try:
            group = self._group(wanted, "PACK", f"sampler {index}", ROOM_S)
        except StalledError as error:  # another job has taken the free resources since
            raise ClusterError(f"no room for one more sampler now: {error}") from error
        return _slots(group, section, wanted)[0]

    def lacking(self, slot: Slot) -> str | None:
        """The resources that a slot waits for after its node was lost; None if it is placed."""
        table = placement_group_table(slot.group)
        if table["state"] == "CREATED":
            return None
        return f"{_resources(table['bundles'][slot.bundle])} on {_has()}"

    def release(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()

    def _group(
        self, bundles: Sequence[Needs], strategy: str, what: str, limit_s: float | None = None
    ) -> PlacementGroup:
        group = placement_group([dict(bundle) for bundle in bundles], strategy=strategy)
        self._groups.append(group)
        asked = ", ".join(_resources(bundle) for bundle in bundles[:4]) + (", ..." if len(bundles) > 4 else "")
        began, noted = time.monotonic(), False
        while not group.wait(timeout_seconds=POLL_S):
            waited = time.monotonic() - began
            if placement_group_table(group)["stats"]["scheduling_state"] == "INFEASIBLE":
                raise ClusterError(
                    f"{what}: {len(bundles)} places ({asked}) with placement {strategy} do not fit on {_has()}"
                )
            if waited > (limit_s or self.config.watchdog.limit_of("start")):
                limit = f"{limit_s:g}" if limit_s else "watchdog.stages.start"
                self._groups.remove(group)
                remove_placement_group(group)
                raise StalledError(
                    f"{what}: waited {waited:.0f} s ({limit}) for {len(bundles)} places ({asked}) on {_has()}"
                    f"; free now: {_resources(ray.available_resources())}. Another job holds the rest"
                )
            if waited > NOTED_AFTER_S and not noted:
                noted = True
                self.note(
                    f"waiting for room for the {what} ({asked}); free now: {_resources(ray.available_resources())}"
                )
        return group


def refuse_shortfall(config: JobConfig) -> None:
    """Compare the job's resources with the cluster's, before any actor could wait for them silently.

    Raises:
        ClusterError: the shortfall, and the keys that ask for it.
    """
    learner, sampler = config.learner, config.sampler
    has = ray.cluster_resources()
    asked_L = [needs(learner, i) for i in range(learner.num_workers)]
    asked_S = [needs(sampler, i) for i in range(sampler.num_workers)]
    for address in dict.fromkeys([*learner.nodes, *sampler.nodes]):
        if f"node:{address}" not in has:
            known = ", ".join(node["NodeManagerAddress"] for node in _alive())
            raise ClusterError(
                f"learner.nodes, sampler.nodes: no node {address!r} in the cluster; its nodes are {known}"
            )
    for resource in dict.fromkeys(name for asked in (*asked_L, *asked_S) for name in asked):
        of_learner, of_samplers = (sum(one.get(resource, 0.0) for one in asked) for asked in (asked_L, asked_S))
        asked, present = of_learner + of_samplers, has.get(resource, 0.0)
        if asked > present and not math.isclose(asked, present):
            key = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(resource, "resources")
            raise ClusterError(
                f"job asks for {asked:g} {resource}s, the cluster has {present:g}: "
                f"learner.num_workers {learner.num_workers} x learner.{key} {asked_L[0].get(resource, 0.0):g} + "
                f"sampler.num_workers {sampler.num_workers} x sampler.{key} {asked_S[0].get(resource, 0.0):g}. Ask for "
                "less (parts of a core are allowed: sampler.num_cpus=0.5), or join a larger cluster"
            )
    for who, wanted in (("learner rank", asked_L), ("sampler", asked_S)):
        for one in wanted:
            if not any(_fits(one, node["Resources"]) for node in _alive()):
                raise ClusterError(
                    f"no node of the cluster can hold one {who}, which asks for {_resources(one)}; it is {_has()}"
                )


def _slots(group: PlacementGroup, section: LearnerSection | SamplerSection, wanted: Sequence[Needs]) -> list[Slot]:
    return [
        Slot(
            group,
            bundle,
            {"num_cpus": section.num_cpus, "num_gpus": section.num_gpus, "runtime_env": threads_env(section.threads)},
        )
        for bundle in range(len(wanted))
    ]


def _together(one: Needs, other: Needs) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in (*one, *other)}


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _fits(wanted: Needs, has: Needs) -> bool:
    return all(has.get(name, 0.0) >= amount for name, amount in wanted.items())


def _has() -> str:
    nodes = [f"{node['NodeManagerAddress']}: {_resources(node['Resources'])}" for node in _alive()]
    return f"{len(nodes)} nodes ({'; '.join(nodes)})" if len(nodes) > 1 else f"one node ({nodes[0]})"


def _resources(amounts: Needs) -> str:
    """Countable resources in words, without memory and Ray's labels."""
    shown = {
        name: amount
        for name, amount in amounts.items()
        if not name.startswith(("node:", "memory", "object_store_memory", "bundle_group", "accelerator_type"))
        and "_group_" not in name
    }
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"
