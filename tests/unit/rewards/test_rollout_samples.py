"""Which completions a person is shown, and what is said of their tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlsys.datums import DatumBatch
from rlsys.rewards.rollout_samples import LearnedBatch, _token_values, best_and_worst, first_of_groups
from rlsys.rollouts import Rollouts, offsets_of


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


def test_each_completion_is_shown_with_its_own_advantages_and_ratios_whatever_piece_it_is_in() -> None:
    """Two tokens each; completion 1 made no datum, 2 and 0 are in one piece in this order, 3 in another."""
    made = rollouts([0, 0, 1, 1])
    made = replace(
        made, tokens=np.arange(8, dtype=np.int32), logprobs=np.zeros(8, np.float32), versions=np.zeros(8, np.int32),
        offsets=offsets_of([2] * 4),
    )  # fmt: skip

    def batch(advantages: list[float]) -> DatumBatch:
        """Datums of one prompt position and two tokens, each token with its own advantage."""
        columns = np.array([[0.0, a, a + 0.5] for a in advantages], np.float32).reshape(-1)
        weights = np.tile([0.0, 1.0, 1.0], len(advantages)).astype(np.float32)
        ids, q = np.zeros(len(columns), np.int32), np.zeros(len(columns), np.float32)
        offsets = offsets_of([3] * len(advantages))
        return DatumBatch(ids, ids, offsets, {"weights": weights, "advantages": columns, "logprobs": q})

    batches = [batch([2.0, 10.0]), batch([3.0])]
    learned = LearnedBatch(
        batches, [np.array([2, 0]), np.array([3])], [np.log(np.r_[1, 2, 3, 1, 4, 5]), np.log([1, 6, 7])]
    )
    found = [_token_values(made, r, learned) for r in range(4)]
    assert [advantages for advantages, _ in found] == [[10.0, 10.5], [0.0, 0.0], [2.0, 2.5], [3.0, 3.5]]
    wanted = [[4, 5], [None, None], [2, 3], [6, 7]]
    assert [[None if x is None else round(x, 5) for x in ratios] for _, ratios in found] == wanted
