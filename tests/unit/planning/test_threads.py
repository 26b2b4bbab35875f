"""Threads of learner and sampler: as many as cores are free for each, where the model gains from them."""

from __future__ import annotations

from typing import NoReturn

import pytest

from rlsys.config import JobConfig, parse_config
from rlsys.planning.threads import choose_threads
from rlsys.utils.free_cores import Cores

LARGE = 4096


def job(*overrides: str) -> JobConfig:
    return parse_config("run: {name: one}\nmodel: {path: some/model}", overrides)


def idle(count: int, quota: float = float("inf")) -> Cores:
    return Cores(frozenset(range(count)), {}, quota)


def never() -> NoReturn:
    raise AssertionError("the cores were measured, although the choice does not depend on them")


def chosen(*overrides: str, cores: Cores, hidden: int | None = LARGE) -> tuple[int, int]:
    threads = choose_threads(job(*overrides), hidden, False, lambda: cores)
    return threads.learner, threads.sampler


ON_IDLE_CORES = [
    ((), 2, (2, 2)),  # they alternate, so each has both cores
    ((), 8, (8, 8)),
    (["overlap.max_policy_lag=1"], 2, (1, 1)),
    (["overlap.max_policy_lag=1"], 8, (4, 4)),
    (["overlap.max_policy_lag=1", "sampler.num_workers=3"], 8, (2, 2)),
    (["sampler.num_workers=4"], 8, (8, 2)),
    (["sampler.tensor_parallel_size=2"], 8, (8, 4)),
    (["learner.num_workers=16"], 8, (1, 8)),
    (["learner.cores=[0]", "sampler.cores=[1]", "overlap.max_policy_lag=1"], 2, (1, 1)),
    (["learner.cores=[0, 1, 2]", "sampler.cores=[3]", "overlap.max_policy_lag=1"], 4, (3, 1)),
    (["learner.cores=[0, 1, 2]", "overlap.max_policy_lag=1"], 8, (3, 5)),
    (["learner.cores=[0, 1]", "sampler.cores=[0, 1]", "overlap.max_policy_lag=1"], 8, (1, 1)),
    (["learner.cores=[0, 1, 2]"], 8, (3, 8)),
    (["learner.cores=[0, 1]", "overlap.max_policy_lag=1"], 2, (1, 1)),
    (["cluster.num_cpus=3"], 8, (3, 3)),
    (["learner.threads=5"], 8, (5, 8)),
]


@pytest.mark.parametrize(("overrides", "count", "wanted"), ON_IDLE_CORES, ids=str)
def test_cores_are_divided_among_what_computes_at_the_same_time(
    overrides: list[str], count: int, wanted: tuple[int, int]
) -> None:
    assert chosen(*overrides, cores=idle(count)) == wanted


@pytest.mark.parametrize(
    ("busy", "wanted"),
    [({0: 1.0}, 1), ({0: 0.5, 1: 0.5}, 1), ({0: 0.1, 1: 0.1}, 2), ({0: 1.0, 1: 1.0}, 1), ({7: 1.0}, 2)],
    ids=str,
)
def test_cores_that_other_processes_keep_busy_are_not_used(busy: dict[int, float], wanted: int) -> None:
    assert chosen(cores=Cores(frozenset({0, 1}), busy)) == (wanted, wanted)


@pytest.mark.parametrize(("quota", "wanted"), [(1.5, 1), (2.0, 2), (0.5, 1)])
def test_the_time_limit_of_a_container_bounds_the_threads(quota: float, wanted: int) -> None:
    assert chosen(cores=idle(8, quota)) == (wanted, wanted)


@pytest.mark.parametrize(("hidden", "wanted"), [(96, 1), (255, 1), (256, 2), (576, 4), (2048, 8)])
def test_a_small_model_gets_no_thread_that_it_gains_nothing_from(hidden: int, wanted: int) -> None:
    assert chosen(cores=idle(8), hidden=hidden) == (wanted, wanted)


@pytest.mark.parametrize(
    ("overrides", "hidden", "joined", "wanted", "reason"),
    [
        ((), 96, False, (1, 1), "hidden size 96"),
        ((), None, False, (1, 1), "not known"),
        (["learner.num_cpus=4"], LARGE, True, (4, 1), "learner.num_cpus, on a cluster"),
        (["sampler.num_cpus=0.5"], LARGE, True, (1, 1), "sampler.num_cpus, on a cluster"),
        (["learner.num_gpus=1", "sampler.num_gpus=1"], LARGE, False, (1, 1), "learner.num_gpus"),
        (["learner.threads=3", "sampler.threads=2"], LARGE, False, (3, 2), "(configured)"),
    ],
    ids=str,
)
def test_where_free_cores_do_not_matter_they_are_not_measured(
    overrides: list[str], hidden: int | None, joined: bool, wanted: tuple[int, int], reason: str
) -> None:
    threads = choose_threads(job(*overrides), hidden, joined, never)
    assert (threads.learner, threads.sampler) == wanted
    assert reason in str(threads)


def test_the_choice_says_what_was_free_and_what_was_configured() -> None:
    both = choose_threads(job(), LARGE, False, lambda: Cores(frozenset({0, 1, 2}), {0: 1.0}))
    assert str(both) == "learner 2, sampler 2 (2 of 3 cores free, sampling and learning alternate)"
    one = choose_threads(job("learner.threads=1", "overlap.max_policy_lag=1"), LARGE, False, lambda: idle(4))
    assert str(one) == "learner 1 (configured), sampler 2 (4 of 4 cores free, sampling and learning overlap)"
