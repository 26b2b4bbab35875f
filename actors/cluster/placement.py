"""Placement of a job's actors: reserved as placement groups before any actor starts, or refused with the shortfall."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.inventory import alive_nodes
from actors.cluster.ray_cluster import threads_env
from rlsys.config import JobConfig, LearnerSection, SamplerSection, gpu_shares
from rlsys.errors import ClusterError, StalledError
from rlsys.planning.fit import Resources, amounts, fits, groups, job_shortfalls, needs, shortages, sum_resources

POLL_S = 0.2
SETTLE_S = 2.0  # for Ray to give back the places of a removed group
NOTED_AFTER_S = 5.0  # of waiting for resources that others hold
ROOM_S = 10.0  # limit for one more sampler, whose resources are free already


@dataclass(frozen=True, slots=True)
class Slot:
    """Reserved resources for one actor."""

    group: PlacementGroup
    bundle: int
    options: Mapping[str, object]  # what the actor itself takes of the bundle

    @property
    def node(self) -> str | None:
        """Hex id of the node that holds the slot now."""
        found: str | None = placement_group_table(self.group)["bundles_to_node_id"].get(self.bundle)
        return found

    @property
    def threads(self) -> int:
        runtime = self.options["runtime_env"]
        assert isinstance(runtime, Mapping)
        return int(runtime["env_vars"]["OMP_NUM_THREADS"])

    def ray_options(self) -> dict[str, object]:
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
        reserved = [self._group(group.bundles, group.strategy, group.workers) for group in groups(self.config)]
        of_learner, of_samplers = reserved[0], reserved[-1]  # one group of both with sampler.colocate
        return _slots(of_learner, learner, learner.num_workers), _slots(of_samplers, sampler, sampler.num_workers)

    def another_sampler(self, index: int) -> Slot:
        """A slot for a sampler beyond those of `reserve`; raises as `reserve`."""
        section = self.config.sampler
        wanted = needs(section, index)
        if gpu_shares.stacked(section.num_gpus):
            raise ClusterError(
                f"no room for one more sampler: with sampler.num_gpus {section.num_gpus:g} Ray may put it on the GPU "
                "of another, where each engine takes the other's memory for its own; set sampler.num_gpus=1"
            )
        if not any(fits(wanted, node.resources) for node in alive_nodes()):
            raise ClusterError(f"no node of the cluster can hold one more sampler, which asks for {amounts(wanted)}")
        short = "; ".join(map(str, shortages(wanted, ray.available_resources())))
        if short:
            raise ClusterError(f"no room for one more sampler now: {short}")
        try:
            group = self._group([wanted], "PACK", f"sampler {index}", ROOM_S)
        except StalledError as error:  # another job has taken the free resources since
            raise ClusterError(f"no room for one more sampler now: {error}") from error
        return _slots(group, section, 1)[0]

    def lacking(self, slot: Slot) -> str | None:
        """The resources that a slot waits for after its node was lost; None if it is placed."""
        table = placement_group_table(slot.group)
        if table["state"] == "CREATED":
            return None
        return f"{amounts(table['bundles'][slot.bundle])} on {_has()}"

    def _free(self) -> Resources:
        """What is free, once Ray has given back the places of a group that was removed."""
        ends = time.monotonic() + SETTLE_S
        while not self._is_alone(free := ray.available_resources()) and time.monotonic() < ends:
            time.sleep(POLL_S)
        return free

    def _is_alone(self, free: Resources) -> bool:
        own = [bundle for group in self._groups for bundle in group.bundle_specs]
        return fits(sum_resources(node.resources for node in alive_nodes()), sum_resources([free, *own]))

    def _who_holds(self, free: Resources) -> str:
        if self._is_alone(free):
            why = "Ray cannot put this job's places side by side on single nodes and GPUs"
            return f"No other job holds resources: {why}; request less for each"
        return "Another job holds the rest"

    def release(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()

    def _group(
        self, bundles: Sequence[Resources], strategy: str, what: str, limit_s: float | None = None
    ) -> PlacementGroup:
        group = placement_group([dict(bundle) for bundle in bundles], strategy=strategy)
        self._groups.append(group)
        asked = ", ".join(amounts(bundle) for bundle in bundles[:4]) + (", ..." if len(bundles) > 4 else "")
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
                free = self._free()
                raise StalledError(
                    f"{what}: waited {waited:.0f} s ({limit}) for {len(bundles)} places ({asked}) on {_has()}"
                    f"; free now: {amounts(free)}. {self._who_holds(free)}"
                )
            if waited > NOTED_AFTER_S and not noted:
                noted = True
                self.note(f"waiting for room for the {what} ({asked}); free now: {amounts(ray.available_resources())}")
        return group


def refuse_shortfall(config: JobConfig) -> None:
    """Compare the job's resources with the cluster's, before any actor could wait for them silently.

    Raises:
        ClusterError: the shortfall, and the keys that ask for it.
    """
    shortfall = next(job_shortfalls(config, alive_nodes()), None)
    if shortfall is not None:
        raise ClusterError(f"the job does not fit the cluster: {shortfall}")


def _slots(group: PlacementGroup, section: LearnerSection | SamplerSection, count: int) -> list[Slot]:
    return [
        Slot(
            group,
            bundle,
            {"num_cpus": section.num_cpus, "num_gpus": section.num_gpus, "runtime_env": threads_env(section.threads)},
        )
        for bundle in range(count)
    ]


def _has() -> str:
    nodes = [f"{node.name}: {amounts(node.resources)}" for node in alive_nodes()]
    return f"{len(nodes)} nodes ({'; '.join(nodes)})" if len(nodes) > 1 else f"one node ({nodes[0]})"
