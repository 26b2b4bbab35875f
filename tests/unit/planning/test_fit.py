"""Which bundles of resources fit on which nodes."""

from __future__ import annotations

import pytest

from rlsys.config import parse_config
from rlsys.planning.fit import Node, Shortage, amounts, fits, groups, job_shortfalls, packs, shortages, sum_resources


def node(name: str = "a", **resources: float) -> Node:
    return Node(name, resources, memory=0)


def test_tenths_that_sum_to_a_node_s_cores_fit_and_the_smallest_unit_more_does_not() -> None:
    three = sum_resources([{"CPU": 0.1}] * 3)
    assert three["CPU"] > 0.3, "the sum is inexact"
    assert fits(three, {"CPU": 0.3})
    assert not fits({"CPU": 0.3001}, {"CPU": 0.3})


def test_a_shortage_says_how_much_is_missing_of_each_resource() -> None:
    found = list(shortages({"CPU": 3.0, "GPU": 1.0, "disk": 2.0}, {"CPU": 4.0, "disk": 0.5}))
    assert found == [Shortage("GPU", 1.0, 0.0), Shortage("disk", 2.0, 0.5)]
    assert str(found[1]) == "2 disk needed, 0.5 found, 1.5 too few"


def test_bundles_pack_onto_nodes_in_any_order_and_a_fragmented_cluster_holds_fewer() -> None:
    cluster = [node("a", CPU=4.0), node("b", CPU=4.0, GPU=1.0)]
    assert packs([{"CPU": 1.0}, {"CPU": 3.0}, {"CPU": 4.0, "GPU": 1.0}], cluster)
    assert packs([{"CPU": 1.0}, {"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}], cluster), "the GPU's bundle is placed first"
    assert not packs([{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 2.0}], cluster), "8 cores in total, but 1 + 1 are left"


def test_a_pair_that_no_single_node_holds_is_a_shortfall_although_its_parts_fit() -> None:
    job = "run: {name: a}\nmodel: {make: {}}\n"
    pair = parse_config(job, ["sampler.colocate=true"])
    assert [group.bundles for group in groups(pair)] == [({"CPU": 2.0},)]
    two = [node("a", CPU=1.0), node("b", CPU=1.0)]
    (shortfall,) = job_shortfalls(pair, two)
    assert shortfall.startswith("no single node can hold one learner rank with its sampler, which needs 2 CPU")
    assert list(job_shortfalls(parse_config(job), two)) == []


@pytest.mark.parametrize(
    "uncounted", ["node:10.0.0.1", "memory", "object_store_memory", "accelerator_type:L4", "CPU_group_0_abc"]
)
def test_ray_s_labels_sizes_and_copies_are_not_listed(uncounted: str) -> None:
    assert amounts({"CPU": 2.0, uncounted: 1.0, "disk": 0.5}) == "2 CPU, 0.5 disk"
    assert amounts({uncounted: 1.0}) == "nothing"
