"""Turns of a learner in closed form."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from rlsys.service.fair_turns import FairShares, FairTurns


@dataclass(eq=False)
class Pass:
    """A pass of `turns` micro-batches of `tokens` tokens each."""

    tenant: str
    model: str
    turns: int
    tokens: int


def serve(queue: FairTurns[Pass], turns: int) -> list[Pass]:
    """What is served in the next turns."""
    served = []
    for _ in range(turns):
        work = queue.choose()
        work.turns -= 1
        queue.charge(work.tenant, work.model, work.tokens)
        if not work.turns:
            queue.remove(work.tenant, work.model, work)
        served.append(work)
    return served


def entered(queue: FairTurns[Pass], *passes: Pass) -> Sequence[Pass]:
    for each in passes:
        queue.enter(each.tenant, each.model, each)
    return passes


def test_a_small_pass_waits_for_one_micro_batch_of_a_big_one() -> None:
    queue = FairTurns[Pass]()
    big, *_ = entered(queue, Pass("a", "big", 1000, 4096))
    assert serve(queue, 5) == [big] * 5
    for _ in range(20):
        chosen = queue.choose()  # a turn of the big one is under way when the small one arrives
        (small,) = entered(queue, Pass("b", "small", 1, 64))
        queue.charge(chosen.tenant, chosen.model, chosen.tokens)
        assert chosen is big and serve(queue, 1) == [small]


def test_two_tenants_get_equal_tokens_from_turns_of_different_sizes() -> None:
    queue = FairTurns[Pass]()
    large, little = entered(queue, Pass("a", "m", 1000, 4), Pass("b", "n", 1000, 1))
    served = serve(queue, 25)
    assert served == [large, *[little] * 4] * 5, "ties go to the one that waited longest"


def test_a_user_with_nine_models_gets_as_much_as_a_user_with_one() -> None:
    queue = FairTurns[Pass]()
    many = entered(queue, *(Pass("a", f"m{i}", 100, 10) for i in range(9)))
    (one,) = entered(queue, Pass("b", "n", 100, 10))
    served = serve(queue, 90)
    assert served.count(one) == 45 and {served.count(each) for each in many} == {5}


def test_a_models_work_is_done_in_the_order_of_its_entry() -> None:
    queue = FairTurns[Pass]()
    passes = entered(queue, *(Pass("a", "m", 2, 10) for _ in range(5)))
    assert serve(queue, 10) == [each for each in passes for _ in range(2)]


def test_idleness_earns_no_credit() -> None:
    queue = FairTurns[Pass]()
    (busy,) = entered(queue, Pass("a", "m", 1000, 10))
    entered(queue, Pass("b", "n", 1, 10))
    serve(queue, 100)
    (back,) = entered(queue, Pass("b", "n", 1000, 10))
    served = serve(queue, 40)
    assert served.count(busy) == served.count(back) == 20


def test_a_user_who_leaves_and_comes_back_at_once_pays_for_what_was_used_before() -> None:
    queue = FairTurns[Pass]()
    (other,) = entered(queue, Pass("b", "n", 1000, 1))
    (greedy,) = entered(queue, Pass("a", "m", 1, 100))
    assert serve(queue, 2) == [other, greedy]
    (again,) = entered(queue, Pass("a", "m", 1, 100))
    assert serve(queue, 100) == [other] * 99 + [again]


@pytest.mark.parametrize("seed", range(10))
def test_tenants_with_work_are_never_further_apart_than_the_largest_turn_of_each(seed: int) -> None:
    draw, queue = random.Random(seed), FairTurns[Pass]()
    passes = entered(
        queue, *(Pass(f"u{i}", f"m{i}.{j}", 10**6, draw.randint(1, 4096)) for i in range(4) for j in range(3))
    )
    used = dict.fromkeys((each.tenant for each in passes), 0)
    for _ in range(3000):
        (served,) = serve(queue, 1)
        used[served.tenant] += served.tokens
        assert max(used.values()) - min(used.values()) <= 4096


def test_work_that_is_removed_gets_no_turn_and_tenants_without_work_take_no_memory() -> None:
    queue, shares = FairTurns[Pass](), FairShares()
    first, second, other = entered(queue, Pass("a", "m", 9, 1), Pass("a", "m", 9, 1), Pass("b", "n", 9, 1))
    assert queue.work_of("m") == [first, second] and len(queue) == 3
    for each in (first, second):
        queue.remove("a", "m", each)
    assert serve(queue, 3) == [other] * 3 and queue.work_of("m") == []
    for i in range(1000):
        shares.join(f"tenant {i}")
        shares.charge(shares.choose(), 1)
        shares.leave(f"tenant {i}")
    assert len(shares) == 0 and len(shares._times) <= 2
