"""Which completions a person is shown, and what is said of their tokens."""

from __future__ import annotations

import numpy as np

from rlsys.rollouts import Rollouts, offsets_of
from rlsys.showing import best_and_worst, first_of_groups


def rollouts(groups: list[int]) -> Rollouts:
    R, P = len(groups), len(set(groups))
    return Rollouts(
        problems=np.arange(P),
        prompt_tokens=np.ones(P, np.int32),
        prompt_offsets=offsets_of([1] * P),
        group=np.array(groups, np.int32),
        tokens=np.arange(R, dtype=np.int32),
        logprobs=np.zeros(R, np.float32),
        versions=np.zeros(R, np.int32),
        offsets=offsets_of([1] * R),
        stop_reasons=np.zeros(R, np.int8),
    )


def test_the_best_and_the_worst_come_from_different_groups_and_stand_out_of_theirs() -> None:
    #                    group 0     group 1     group 2
    rewards = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1], np.float32)
    chosen = best_and_worst(rollouts([0] * 4 + [1] * 4 + [2] * 4), rewards, 4)
    # the one right answer of group 1 stands out most, then one of group 0; the wrong one of group 0 among right ones
    assert chosen[:2].tolist() == [4, 0]
    assert chosen[-1] == 3, "the worst is the last"
    assert chosen[2] in (5, 6, 7)


def test_no_completion_is_shown_twice_and_no_more_than_there_are() -> None:
    for count in range(8):
        chosen = best_and_worst(rollouts([0, 0, 1, 1, 1]), np.zeros(5, np.float32), count)
        assert len(chosen) == len(set(chosen)) == min(count, 5)


def test_of_held_out_problems_the_first_completion_of_each_is_shown() -> None:
    assert first_of_groups(rollouts([0, 0, 1, 2, 2]), 2).tolist() == [0, 2]
