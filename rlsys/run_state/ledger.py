"""Ledger of the problems that a run has drawn and their outcomes: it makes a resumed run draw the same problems.

One row per draw, in the order of ``Epochs``: row i is the problem at position i. A row is pending, in flight, or
settled with an outcome. Pending rows are drawn first, in order. Rolling back to step s makes every row of a later step
pending, so that later steps draw the same ids as without an interruption. Several steps may be in flight, and a step in
flight may draw more rows (dynamic sampling).

    row      0 1 2 3 4 5 6 7        settled up to step 2, step 3 in flight
    step     1 1 2 2 3 3 - -        roll_back(1) makes rows 2 to 5 pending; rows 6 and 7 are from an earlier rollback
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np

from rlsys.data.problems import Epochs
from rlsys.errors import CheckpointError
from rlsys.types import Array

PENDING, IN_FLIGHT, TRAINED, AGREED, EMPTY, UNGRADED = range(6)
MEANING = {  # code -> (state, reason)
    PENDING: ("pending", ""),
    IN_FLIGHT: ("in flight", ""),
    TRAINED: ("trained", ""),
    AGREED: ("filtered", "all rewards of the group are equal, so it has no gradient"),
    EMPTY: ("filtered", "no completion of the group has a token to train on"),
    UNGRADED: ("dropped", "no completion of the group could be graded"),
}
FORMAT_VERSION = 1
_DIGEST_BYTES = 16
_COLUMNS = {"problem": np.int64, "step": np.int32, "state": np.int8, "attempts": np.int32}


class Ledger:
    """The draws of one run. A step draws, then all its draws are settled together; steps are settled in order."""

    def __init__(self, epochs: Epochs) -> None:
        self._epochs = epochs
        self._step = 0
        self._problem, self._steps, self._state, self._attempts = (np.empty(0, kind) for kind in _COLUMNS.values())

    def __len__(self) -> int:
        return len(self._problem)

    @property
    def step(self) -> int:
        """The last settled step; 0 before the first."""
        return self._step

    def draw(self, step: int, count: int) -> Array:
        """(count,) int64 ids for an unsettled step: pending rows first, then new rows."""
        assert count >= 1 and step > self._step, f"draws of step {step} come after step {self._step} is settled"
        assert step >= self._steps.max(initial=0) or len(self._flying(step)), "steps draw in order"
        new = count - int(np.count_nonzero(self._state == PENDING))
        if new > 0:
            self._append(new)
        rows = np.flatnonzero(self._state == PENDING)[:count]
        self._steps[rows], self._state[rows] = step, IN_FLIGHT
        self._attempts[rows] += 1
        return self._problem[rows].copy()

    def resampled(self, ids: Array) -> None:
        """Count another attempt for problems in flight; an id that occurs twice counts twice."""
        flying = np.flatnonzero(self._state == IN_FLIGHT)
        for problem, times in zip(*np.unique(np.asarray(ids, np.int64), return_counts=True), strict=True):
            rows = flying[self._problem[flying] == problem]
            assert len(rows) >= times, f"problem {problem} is not in flight {times} times"
            self._attempts[rows[:times]] += 1

    def settle(self, step: int, outcomes: Array) -> None:
        """Close the step after `self.step`: (P,) codes TRAINED, AGREED, EMPTY or UNGRADED, in the order drawn."""
        rows = self._flying(step)
        outcomes = np.asarray(outcomes, np.int8)
        assert step == self._step + 1, f"step {step} cannot be settled after step {self._step}"
        assert len(rows) == len(outcomes) > 0, f"{len(outcomes)} outcomes for {len(rows)} problems in flight"
        assert np.isin(outcomes, (TRAINED, AGREED, EMPTY, UNGRADED)).all(), f"outcomes {np.unique(outcomes)}"
        self._state[rows] = outcomes
        self._step = step

    def roll_back(self, step: int) -> None:
        """Make all draws of later steps pending; they are drawn first, in the same order."""
        assert 0 <= step <= self._step, f"cannot go back from step {self._step} to step {step}"
        rows = self._steps > step
        self._steps[rows], self._state[rows] = 0, PENDING
        self._step = step

    def ids(self, step: int) -> Array:
        """Ids that a step drew, in flight or settled."""
        return self._problem[self._steps == step] if step > 0 else np.empty(0, np.int64)

    def table(self) -> dict[str, Array]:
        """Columns with an entry per draw: problem, step (0 while pending), state (a key of MEANING), attempts."""
        return {name: column.copy() for name, column in zip(_COLUMNS, self._columns(), strict=True)}

    def counts(self) -> dict[str, int]:
        """Draws by state: pending, in flight, trained, filtered, dropped."""
        found = {state: 0 for state, _ in MEANING.values()}
        for code, (state, _) in MEANING.items():
            found[state] += int(np.count_nonzero(self._state == code))
        return found

    def audit(self) -> None:
        """Check that every draw occurs exactly once, in order, and that every step has draws.

        Raises:
            CheckpointError: a check fails; the message names it.
        """
        wrong = np.flatnonzero(self._problem != self._epochs.take(0, len(self)))
        if wrong.size:
            row = int(wrong[0])
            raise CheckpointError(
                f"ledger: draw {row}: found problem {self._problem[row]}; wanted {self._epochs.take(row, 1)[0]}, as "
                f"run.seed {self._epochs.seed} orders {self._epochs.num_problems} problems"
            )
        given = np.flatnonzero(self._state != PENDING)
        steps, states = self._steps[given], self._state[given]
        settled = states != IN_FLIGHT
        claims = {
            "a state is unknown": np.isin(self._state, list(MEANING)).all(),
            "a pending draw has a step": not self._steps[self._state == PENDING].any(),
            "a draw in flight or settled was never attempted": (self._attempts[given] > 0).all(),
            "first draws of steps are not in the order of the steps": _firsts_ascend(steps),
            f"a draw of a step after {self._step} is settled": (steps[settled] <= self._step).all(),
            f"a draw of step {self._step} or before is in flight": (steps[~settled] > self._step).all(),
            f"a step up to {self._step} has no draw": len(np.unique(steps[settled])) == self._step,
        }
        for complaint, holds in claims.items():
            if not holds:
                raise CheckpointError(
                    f"ledger: {complaint}: the ledger is damaged, or a step is missing or occurs twice"
                )

    def to_bytes(self) -> bytes:
        """An .npz archive followed by its hash."""
        head = [FORMAT_VERSION, self._step, self._epochs.num_problems, self._epochs.seed]
        arrays: dict[str, Any] = {"head": np.array(head, np.int64)}  # Any: for savez a keyword may be its flag
        arrays |= zip(_COLUMNS, self._columns(), strict=True)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue() + _digest(buffer.getvalue())

    @classmethod
    def from_bytes(cls, content: bytes, epochs: Epochs) -> Ledger:
        """Read what ``to_bytes`` wrote. Draws in flight become pending: their work was lost.

        Raises:
            CheckpointError: it is damaged, of another version or order of problems, or fails ``audit``.
        """
        body = content[:-_DIGEST_BYTES]
        if content[-_DIGEST_BYTES:] != _digest(body):
            raise CheckpointError(f"ledger: its {len(content)} bytes do not match their hash: the ledger is damaged")
        with np.load(io.BytesIO(body), allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
        version, step, num_problems, seed = (int(value) for value in found["head"])
        if version != FORMAT_VERSION:
            raise CheckpointError(f"ledger: found format version {version}; this rlsys reads {FORMAT_VERSION}")
        if (num_problems, seed) != (epochs.num_problems, epochs.seed):
            raise CheckpointError(
                f"ledger: found {num_problems} problems in the order of seed {seed}; wanted {epochs.num_problems} "
                f"(task.train_problems) and {epochs.seed} (run.seed)"
            )
        ledger = cls(epochs)
        ledger._step = step
        ledger._problem, ledger._steps, ledger._state, ledger._attempts = (found[name] for name in _COLUMNS)
        ledger.roll_back(step)
        ledger.audit()
        return ledger

    def _columns(self) -> tuple[Array, Array, Array, Array]:
        return self._problem, self._steps, self._state, self._attempts

    def _append(self, count: int) -> None:
        new = self._epochs.take(len(self), count)
        rest = (np.zeros(count, kind) for kind in list(_COLUMNS.values())[1:])  # 0: no step, PENDING, no attempt
        both = zip(self._columns(), (new, *rest), strict=True)
        self._problem, self._steps, self._state, self._attempts = (np.concatenate(pair) for pair in both)

    def _flying(self, step: int) -> Array:
        return np.flatnonzero((self._steps == step) & (self._state == IN_FLIGHT))


def _firsts_ascend(steps: Array) -> bool:
    """Whether each step's first row comes after the first rows of all earlier steps."""
    return bool((np.diff(np.unique(steps, return_index=True)[1]) > 0).all())


def describe(ledger: Ledger) -> list[tuple[str, str, int]]:
    """(state, reason, draws) for display, in the order of a draw's life; states without draws too."""
    return [(state, reason, int(np.count_nonzero(ledger._state == code))) for code, (state, reason) in MEANING.items()]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
