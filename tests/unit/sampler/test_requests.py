"""Seeds of requests: of the problem and its occurrence, whatever the calls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rlsys.data.problems import occurrences
from rlsys.sampler.requests import child_seeds, group_seeds


def test_an_occurrence_counts_what_came_before_within_a_batch_and_before_it() -> None:
    assert occurrences(np.array([7, 3, 7, 7])).tolist() == [0, 0, 1, 2]
    assert occurrences(np.array([7, 3, 7]), np.array([3, 3, 7])).tolist() == [1, 2, 2]
    assert occurrences(np.empty(0, np.int64)).tolist() == []


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3, 7), (4,), tuple(range(1, 8))])
def test_a_batch_in_which_problems_repeat_has_the_same_seeds_however_it_is_cut(cuts: tuple[int, ...]) -> None:
    problems = np.array([5, 5, 2, 5, 2, 9, 5, 2])
    whole = child_seeds(3, problems, 4)
    assert len(set(whole)) == len(problems) * 4
    nth, bounds = occurrences(problems), [0, *cuts, len(problems)]
    parts = [child_seeds(3, problems[a:b], 4, nth[a:b]) for a, b in itertools.pairwise(bounds)]
    assert [seed for part in parts for seed in part] == whole


def test_seeds_of_problems_that_come_once_are_those_that_runs_were_recorded_with() -> None:
    first = [1324405586973822274, 4409998176943064389, 2969257924364652165]
    assert group_seeds(21_000_064, np.array([5, 0, 17])) == first
    assert group_seeds(21_000_064, np.array([17, 5]), np.zeros(2, np.int64)) == [first[2], first[0]]
    assert child_seeds(7, np.array([3, 3]), 2)[::2] == [1265390889181019415, 3332667840171778762]
