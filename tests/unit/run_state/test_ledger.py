"""Every draw is accounted for exactly once, whatever interrupts a run, and no interruption changes a step's draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlsys.data.problems import Epochs
from rlsys.errors import CheckpointError
from rlsys.run_state.ledger import AGREED, EMPTY, MEANING, PENDING, TRAINED, UNGRADED, Ledger, describe

EPOCHS = Epochs(num_problems=10, batch=4, seed=3)
OUTCOMES = (TRAINED, AGREED, EMPTY, UNGRADED)


def run(steps: int, epochs: Epochs = EPOCHS) -> Ledger:
    ledger = Ledger(epochs)
    for step in range(1, steps + 1):
        ledger.draw(step, epochs.batch)
        ledger.settle(step, np.full(epochs.batch, TRAINED))
    return ledger


def forged(change: dict[str, object], steps: int = 3) -> bytes:
    """What a ledger would write whose columns somebody has changed."""
    ledger = run(steps)
    for name, value in change.items():
        setattr(ledger, name, value)
    return ledger.to_bytes()


def test_steps_draw_the_batches_of_the_epochs() -> None:
    ledger = Ledger(EPOCHS)
    for step in range(1, 8):  # crosses the ends of two epochs
        np.testing.assert_array_equal(ledger.draw(step, 4), EPOCHS.batch_at(step - 1))
        ledger.settle(step, np.full(4, TRAINED))
    assert ledger.step == 7


def test_every_outcome_is_counted_under_its_state_and_named_with_its_reason() -> None:
    ledger = Ledger(EPOCHS)
    ledger.draw(1, 4)
    ledger.settle(1, np.array([TRAINED, AGREED, EMPTY, UNGRADED], np.int8))
    ledger.draw(2, 4)
    assert ledger.counts() == {"pending": 0, "in flight": 4, "trained": 1, "filtered": 2, "dropped": 1}
    rows = describe(ledger)
    assert [(state, count) for state, _, count in rows] == [
        ("pending", 0),
        ("in flight", 4),
        ("trained", 1),
        ("filtered", 1),
        ("filtered", 1),
        ("dropped", 1),
    ]
    assert len({reason for _, reason, _ in rows}) == 4, "each outcome but training has a reason of its own"


def test_what_was_in_flight_is_pending_after_reading_back_and_drawn_first_in_the_same_order() -> None:
    ledger = run(2)
    lost = ledger.draw(3, 4)
    back = Ledger.from_bytes(ledger.to_bytes(), EPOCHS)
    assert (back.step, back.counts()["pending"], back.counts()["in flight"]) == (2, 4, 0)
    np.testing.assert_array_equal(back.draw(3, 4), lost)
    assert len(back) == 12


def test_a_batch_that_is_drawn_for_partly_from_pending_rows_goes_on_where_the_order_goes_on() -> None:
    ledger = run(2)
    ledger.draw(3, 2)
    ledger.roll_back(2)
    np.testing.assert_array_equal(ledger.draw(3, 4), EPOCHS.batch_at(2))


def test_going_back_undoes_settled_steps_and_no_other() -> None:
    ledger = run(5)
    ledger.roll_back(3)
    assert ledger.step == 3
    assert ledger.counts() == {"pending": 8, "in flight": 0, "trained": 12, "filtered": 0, "dropped": 0}
    for step in (4, 5):
        np.testing.assert_array_equal(ledger.draw(step, 4), EPOCHS.batch_at(step - 1))
        ledger.settle(step, np.full(4, AGREED))
    assert ledger.counts()["filtered"] == 8


def test_attempts_count_samplings_of_a_draw_and_outlive_going_back() -> None:
    epochs = Epochs(num_problems=2, batch=4, seed=0)  # every problem is twice in a batch
    ledger = Ledger(epochs)
    ids = ledger.draw(1, 4)
    ledger.resampled(np.array([ids[0], ids[1], ids[0]]))
    assert sorted(ledger.table()["attempts"].tolist()) == [1, 2, 2, 2]
    ledger.roll_back(0)
    ledger.draw(1, 4)
    assert sorted(ledger.table()["attempts"].tolist()) == [2, 3, 3, 3]
    with pytest.raises(AssertionError, match="not in flight 3 times"):
        ledger.resampled(np.array([0, 0, 0]))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ledger: ledger.settle(3, np.full(4, TRAINED)),  # nothing was drawn for it
        lambda ledger: ledger.draw(2, 4),  # settled
        lambda ledger: (ledger.draw(4, 4), ledger.draw(3, 4)),  # back
        lambda ledger: (ledger.draw(3, 4), ledger.settle(3, np.full(3, TRAINED))),  # one is forgotten
        lambda ledger: (ledger.draw(3, 4), ledger.settle(3, np.full(4, PENDING))),
        lambda ledger: (ledger.draw(3, 4), ledger.draw(4, 4), ledger.settle(4, np.full(4, TRAINED))),  # skips one
        lambda ledger: ledger.roll_back(3),
    ],
)
def test_a_loop_that_skips_or_repeats_a_step_is_stopped(wrong) -> None:
    with pytest.raises(AssertionError):
        wrong(run(2))


def test_one_changed_byte_anywhere_is_noticed() -> None:
    content = run(2).to_bytes()
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 1
        with pytest.raises(CheckpointError, match="do not match their hash"):
            Ledger.from_bytes(bytes(damaged), EPOCHS)


@pytest.mark.parametrize("length", [0, 1, 16, 500])
def test_a_torn_ledger_is_refused(length: int) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        Ledger.from_bytes(run(2).to_bytes()[:length], EPOCHS)


def test_a_ledger_of_another_order_is_refused_with_the_keys_that_make_the_order() -> None:
    content = run(2).to_bytes()
    for other in (Epochs(10, 4, seed=4), Epochs(11, 4, seed=3)):
        with pytest.raises(CheckpointError, match=r"task\.train_problems.*run\.seed"):
            Ledger.from_bytes(content, other)
    Ledger.from_bytes(content, Epochs(10, 5, seed=3))  # the size of a batch does not change the order


STEPS_3 = np.repeat(np.arange(1, 4, dtype=np.int32), 4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"_problem": np.roll(EPOCHS.take(0, 12), 1)}, "draw 0: found problem"),
        ({"_steps": np.where(STEPS_3 == 2, 3, STEPS_3).astype(np.int32)}, "a step up to 3 has no draw"),
        ({"_steps": STEPS_3[::-1].copy()}, "not in the order of the steps"),
        ({"_state": np.full(12, 9, np.int8)}, "a state is unknown"),
        ({"_state": np.r_[np.int8(PENDING), np.full(11, TRAINED, np.int8)]}, "pending draw"),
        ({"_attempts": np.zeros(12, np.int32)}, "never attempted"),
        ({"_state": np.full(12, 1, np.int8)}, "of step 3 or before is in flight"),
    ],
)
def test_an_account_that_does_not_add_up_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        Ledger.from_bytes(forged(change), EPOCHS)


class Interrupted(RuleBasedStateMachine):
    """Draws, settles, loses samplers, goes back and dies as hypothesis likes, and keeps books of its own."""

    @initialize(num_problems=st.integers(1, 12), batch=st.integers(1, 7), seed=st.integers(0, 3))
    def begin(self, num_problems: int, batch: int, seed: int) -> None:
        self.epochs = Epochs(num_problems, batch, seed)
        self.ledger = Ledger(self.epochs)
        self.ahead = 0  # steps drawn for and not settled
        self.outcomes: dict[int, list[int]] = {}
        self.saved = (self.ledger.to_bytes(), 0, dict(self.outcomes))

    @precondition(lambda self: self.ahead < 3)
    @rule()
    def draw(self) -> None:
        step = self.ledger.step + self.ahead + 1
        ids = self.ledger.draw(step, self.epochs.batch)
        np.testing.assert_array_equal(ids, self.epochs.batch_at(step - 1))
        self.ahead += 1

    @precondition(lambda self: self.ahead > 0)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        step, batch = self.ledger.step + 1, self.epochs.batch
        outcomes = data.draw(st.lists(st.sampled_from(OUTCOMES), min_size=batch, max_size=batch))
        self.ledger.settle(step, np.array(outcomes))
        self.outcomes[step] = outcomes
        self.ahead -= 1

    @precondition(lambda self: self.ahead > 0)
    @rule(share=st.floats(0, 1))
    def lose_a_sampler(self, share: float) -> None:
        ids = self.ledger.ids(self.ledger.step + 1)
        self.ledger.resampled(ids[: int(share * len(ids))])

    @rule(back=st.integers(0, 3))
    def roll_back(self, back: int) -> None:
        self._at(max(0, self.ledger.step - back))
        self.ledger.roll_back(max(0, self.ledger.step - back))

    @rule()
    def save(self) -> None:
        self.saved = (self.ledger.to_bytes(), self.ledger.step, dict(self.outcomes))

    @rule()
    def die_and_resume(self) -> None:
        content, step, self.outcomes = self.saved[0], self.saved[1], dict(self.saved[2])
        self.ledger = Ledger.from_bytes(content, self.epochs)
        assert self.ledger.step == step
        self._at(step)

    def _at(self, step: int) -> None:
        self.outcomes = {key: value for key, value in self.outcomes.items() if key <= step}
        self.ahead = 0

    @invariant()
    def every_draw_is_accounted_for_once(self) -> None:
        self.ledger.audit()
        step, table = self.ledger.step, self.ledger.table()
        assert sum(self.ledger.counts().values()) == len(self.ledger)
        np.testing.assert_array_equal(table["problem"], self.epochs.take(0, len(self.ledger)))
        assert sorted(self.outcomes) == list(range(1, step + 1))
        found = [int(state) for state in table["state"][(table["step"] >= 1) & (table["step"] <= step)]]
        assert found == [outcome for key in sorted(self.outcomes) for outcome in self.outcomes[key]]
        for done in range(1, step + self.ahead + 1):
            np.testing.assert_array_equal(self.ledger.ids(done), self.epochs.batch_at(done - 1))


TestInterrupted = Interrupted.TestCase
TestInterrupted.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 60))
def test_any_stretch_of_the_order_can_be_asked_for_alone(num_problems: int, first: int, count: int) -> None:
    epochs = Epochs(num_problems, 1, seed=2)
    np.testing.assert_array_equal(epochs.take(first, count), epochs.take(0, first + count)[first:])
    assert epochs.take(first, count).dtype == np.int64


def test_every_state_has_a_meaning_of_its_own() -> None:
    assert len(set(MEANING.values())) == len(MEANING)
