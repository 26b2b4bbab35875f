"""Which GPUs Ray gives the actors of a job. The GPUs are logical: Ray counts them, and nobody computes on one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from actors.cluster.placement import Placement, Slot
from rlsys.config import parse_config
from rlsys.errors import ClusterError, StalledError
from tests import waiting

JOB = "run: {name: a}\nmodel: {path: x}\nwatchdog: {stages: {start: 60}}\n"
Ids = list[str]
VISIBLE = ("3", "5")
PLAIN = {
    "object_store_memory": 100 * 2**20, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True
}  # fmt: skip


class Seen:
    """An actor in the place of a learner rank or a sampler."""

    def devices(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, which `machine` joins: a node starts in less time than a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.shutdown()  # of whatever this process was connected to
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, **PLAIN})
        ray.init(address=started.address, log_to_driver=False, logging_level="error")
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[int]:
    """A node with so many GPUs; tests of one size share it. Where it has two, they are those that the user left
    visible."""
    gpus: int = request.param
    with pytest.MonkeyPatch.context() as patch:
        if gpus == len(VISIBLE):
            patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(VISIBLE))
        node = cluster.add_node(num_cpus=32, num_gpus=gpus, **PLAIN)
    yield gpus
    cluster.remove_node(node)
    waiting.until(lambda: "GPU" not in ray.cluster_resources(), "the node to be gone")


def of_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("machine", [count], indirect=True, ids=[f"{count} GPUs"])


def of(*overrides: str) -> tuple[list[Ids], list[Ids]]:
    """The devices of a job's learners and samplers."""
    placement = Placement(parse_config(JOB, list(overrides)), print)
    try:
        learners, samplers = placement.reserve()
        actors = [_seated(seat) for seat in (*learners, *samplers)]
        found = [(devices or "").split(",") for devices in ray.get([actor.devices.remote() for actor in actors])]
        for actor in actors:
            ray.kill(actor)
        return found[: len(learners)], found[len(learners) :]
    finally:
        placement.release()


def _seated(seat: Slot) -> ray.actor.ActorHandle:
    """Without the runtime environment: it starts two interpreters where one will do, and has no part in this."""
    options = {key: value for key, value in seat.ray_options().items() if key != "runtime_env"}
    return ray.remote(Seen).options(**options).remote()


def on_cuda(
    ranks: int, of_rank: float, samplers: int, of_sampler: float, *more: str, colocate: bool = False
) -> tuple[str, ...]:
    return (
        f"learner.num_workers={ranks}",
        f"learner.num_gpus={of_rank}",
        f"sampler.num_workers={samplers}",
        f"sampler.num_gpus={of_sampler}",
        f"sampler.colocate={str(colocate).lower()}",
        *more,
    )


def apart(*places: Ids) -> bool:
    """No device is in two of them."""
    devices = [device for place in places for device in place]
    return len(devices) == len(set(devices))


@of_gpus(1)
def test_on_one_gpu_a_pair_shares_it_by_turns_or_by_halves(machine: int) -> None:
    assert of(*on_cuda(1, 0.5, 1, 0.5, colocate=True)) == ([["0"]], [["0"]])
    assert of(*on_cuda(1, 0.5, 1, 0.5, "sampler.gpu_memory_utilization=0.45")) == ([["0"]], [["0"]])
    with pytest.raises(ClusterError, match=r"2 GPU needed, 1 found, 1 too few"):
        of(*on_cuda(1, 1, 1, 1))
    placement = Placement(parse_config(JOB, list(on_cuda(1, 0.5, 1, 0.5, colocate=True))), print)
    with pytest.raises(ClusterError, match=r"another.*set sampler\.num_gpus=1"):
        placement.another_sampler(1)  # of `rlsys scale`: it would land beside the first


@of_gpus(2)
def test_on_two_gpus_of_those_that_the_user_left_visible_ranks_and_pairs_have_one_each(
    machine: int,
) -> None:
    learners, samplers = of(*on_cuda(1, 1, 1, 1))
    assert sorted([*learners[0], *samplers[0]]) == list(VISIBLE)
    for shares in ((0.5, 0.5), (0.3, 0.3)):
        learners, samplers = of(*on_cuda(2, shares[0], 2, shares[1], colocate=True))
        assert learners == samplers and sorted([*learners[0], *learners[1]]) == list(VISIBLE)
    learners, _ = of(*on_cuda(2, 0.6, 1, 0))
    assert sorted([*learners[0], *learners[1]]) == list(VISIBLE)
    _, (engine,) = of("sampler.num_gpus=2", "sampler.tensor_parallel_size=2")
    assert sorted(engine) == list(VISIBLE)


@of_gpus(4)
def test_on_four_gpus_an_engine_of_two_stands_beside_two_ranks(machine: int) -> None:
    learners, samplers = of(*on_cuda(2, 1, 1, 2, "sampler.tensor_parallel_size=2"))
    assert [len(place) for place in samplers] == [2] and apart(*learners, *samplers)


@of_gpus(8)
def test_on_eight_gpus_every_rank_and_every_sampler_has_its_own(machine: int) -> None:
    learners, samplers = of(*on_cuda(2, 1, 6, 1))
    assert apart(*learners, *samplers)
    learners, samplers = of(*on_cuda(4, 0.5, 4, 0.5, colocate=True))
    assert learners == samplers and apart(*learners)


@of_gpus(2)
def test_shares_that_fit_in_total_but_not_on_single_gpus_end_the_wait_with_the_reason(
    machine: int,
) -> None:
    for shares, who in (((3, 0.6, 1, 0), "learner ranks"), ((1, 0.6, 2, 0.6), "samplers")):
        with pytest.raises(StalledError, match=rf"{who}: waited .* places .*No other job .*side by side"):
            of(*on_cuda(*shares, "watchdog.stages.start=3"))
    other = placement_group([{"CPU": 31.0}])
    with pytest.raises(StalledError, match=r"samplers: waited .* 1 places .*Another job holds the rest"):
        of("watchdog.stages.start=3")
    remove_placement_group(other)
    placement = Placement(parse_config(JOB), print)
    with pytest.raises(ClusterError, match=r"3 places .* with placement STRICT_SPREAD do not fit on 2 nodes"):
        placement._group([{"CPU": 1.0}] * 3, "STRICT_SPREAD", "ranks")  # as if two nodes left since the first check
