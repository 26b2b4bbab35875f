"""The order of a model's calls, gaps, and numbers that are used twice."""

from __future__ import annotations

import random

import pytest

from rlsys.serve.model_queue import MAX_AHEAD, Call, ModelQueue


class Recorded:
    """A queue, a clock that the test moves, and what happened."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue = ModelQueue(330.0, lambda: self.now)
        self.events: list[str] = []

    def enter(self, seq: int, is_pass: bool = False) -> None:
        self.queue.enter(
            seq,
            Call(
                f"r{seq}",
                lambda: self.events.append(f"start {seq}"),
                lambda why: self.events.append(f"fail {seq}: {why}"),
                is_pass,
            ),
        )


@pytest.mark.parametrize("seed", range(30))
def test_calls_start_in_the_order_of_their_numbers(seed: int) -> None:
    recorded, numbers = Recorded(), list(range(1, 40))
    random.Random(seed).shuffle(numbers)
    for seq in numbers:
        if seq % 5 == 0:
            recorded.queue.refuse(seq, "no")
        else:
            recorded.enter(seq)
    assert recorded.events == [f"start {seq}" for seq in range(1, 40) if seq % 5]
    assert recorded.queue.next == 40 and recorded.queue.waiting == 0


def test_a_number_has_one_request() -> None:
    recorded = Recorded()
    recorded.enter(2)
    assert recorded.queue.request_of(2) == "r2" and recorded.queue.request_of(1) is None
    recorded.enter(1)
    assert recorded.events == ["start 1", "start 2"] and recorded.queue.request_of(2) == "r2"


def test_a_model_whose_next_call_is_not_there_is_idle_for_hours() -> None:
    recorded = Recorded()
    recorded.enter(1)
    recorded.now = 36_000.0
    recorded.queue.close_overdue()
    recorded.enter(2)
    assert recorded.events == ["start 1", "start 2"]


def test_a_gap_may_close_late_and_closes_once_for_all() -> None:
    recorded = Recorded()
    for seq in (1, 4, 5, 8):
        recorded.enter(seq)
    recorded.now = 329.0
    recorded.queue.close_overdue()
    recorded.queue.refuse(3, "no")  # any arrival gives the model more time
    recorded.now = 600.0
    recorded.queue.close_overdue()
    assert recorded.events == ["start 1"]
    recorded.now = 660.0
    recorded.queue.close_overdue()
    why = "calls 2 to 3 of this model never arrived: its client gave up; reload the last checkpoint"
    assert recorded.events == ["start 1", f"fail 4: {why}", "start 5"]
    recorded.enter(2)
    assert recorded.events[-1] == f"fail 2: {why}"
    recorded.now = 1100.0
    recorded.queue.close_overdue()
    assert recorded.events[-1].startswith("fail 8: calls 6 to 7 of this model never arrived")
    recorded.enter(9)
    assert recorded.events[-1] == "start 9"


def test_lost_passes_are_counted_until_a_step_takes_them() -> None:
    recorded = Recorded()
    recorded.queue.refuse(1, "no", is_pass=True)
    recorded.queue.refuse(1, "no", is_pass=True)
    recorded.queue.refuse(2, "no")
    recorded.enter(4, is_pass=True)
    recorded.now = 331.0
    recorded.queue.close_overdue()
    assert recorded.queue.lost_passes == 3


def test_numbers_from_nowhere_are_not_kept() -> None:
    recorded = Recorded()
    for seq in (0, -1, 1 + MAX_AHEAD, 2**63):
        recorded.queue.refuse(seq, "no")
    assert recorded.queue.refusal_of(2**63) is None and recorded.queue.next == 1
    recorded.enter(MAX_AHEAD)
    recorded.now = 331.0
    recorded.queue.close_overdue()  # one entry, however wide the gap
    assert recorded.queue.closed(2) == recorded.queue.closed(MAX_AHEAD - 1) and recorded.queue.next == MAX_AHEAD + 1


def test_an_abandoned_queue_fails_what_waits() -> None:
    recorded = Recorded()
    recorded.enter(3)
    recorded.enter(2)
    recorded.queue.abandon("gone")
    assert recorded.events == ["fail 2: gone", "fail 3: gone"] and recorded.queue.waiting == 0
