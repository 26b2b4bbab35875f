"""Runs graders in a pool of processes and kills each call that exceeds its time limit.

A wrong answer, a timeout and a failed call are three different outcomes. A wrong answer says something about the model;
timeouts and failures are faults of the grader. A batch with too many of these faults raises an error: otherwise the
model would be trained on their meaningless rewards.
"""

from __future__ import annotations

import concurrent.futures
import math
import numbers
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlsys.errors import ConfigError, GradingError, StalledError
from rlsys.sandbox.process_pool import Call, Ending, ProcessPool, Worker, begin_imports, pickled
from rlsys.types import Array
from rlsys.utils.import_path import import_by_path

if TYPE_CHECKING:
    from rlsys.config import RewardSection

RIGHT, WRONG, TIMEOUT, ERROR = 0, 1, 2, 3  # values of Grades.outcome
KILLED = 4  # internal: the process was killed; the grade is repeated once, and a second KILLED becomes ERROR

Grader = Callable[[str, str], float]  # (completion, answer) -> grade

# Time for starting processes, including a grader's heavy imports, which a call may need beyond two time limits.
START_S = 120.0
# Rebuilds of a broken pool per batch. Pebble marks a pool as broken when its only process dies between two calls.
MAX_REBUILDS = 3
_MESSAGE_CHARS = 200  # characters of a completion in an error message
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Grades:
    """Grades of R completions, all finite.

    A grade of rewards.solved_at or more is RIGHT, a lower grade WRONG. TIMEOUT and ERROR get rewards.failed_grade.
    """

    rewards: Array  # (R,) float32
    outcome: Array  # (R,) int8: RIGHT, WRONG, TIMEOUT or ERROR
    first_error: str  # first TIMEOUT or ERROR: grader, problem and the end of the traceback; "" if there is none

    def counts(self) -> dict[str, float]:
        """Return metrics that count completions by outcome."""
        return {
            "reward/wrong": float((self.outcome == WRONG).sum()),
            "reward/timeouts": float((self.outcome == TIMEOUT).sum()),
            "reward/errors": float((self.outcome == ERROR).sum()),
        }


def _modules(function: Grader | str) -> list[str]:
    return [__name__, function.partition(":")[0] if isinstance(function, str) else function.__module__]


def resolve(path: str) -> Grader:
    """Import the grader at 'package.module:function'.

    Raises:
        ConfigError: the path has another form, the import fails, or the module has no such function.
    """
    target = import_by_path(path, "rewards.function", "'package.module:function'")
    if not callable(target):
        raise ConfigError(f"rewards.function: {path!r} is a {type(target).__name__}; wanted a function")
    function: Grader = target
    return function


class GraderPool:
    """Pool of `section.workers` processes that call the grader on (completion, answer).

    The grader is `section.function` if given, else `function`: an import path, or a picklable callable (a function at
    the top level of a module, a static method, or a method of a picklable object). Timeouts add at most timeout_s each
    to a batch, divided by the number of processes.
    """

    def __init__(self, section: RewardSection, function: Grader | str) -> None:
        function = section.function or function
        self._section = section
        self._name = function if isinstance(function, str) else _name_of(function)
        self._graded = 0
        self._pool = ProcessPool(_worker(function), section.workers, section.timeout_s, _modules(function))

    @staticmethod
    def begin_imports(section: RewardSection, function: Grader | str) -> None:
        """Have what the pool's processes import imported in the background, for a pool of these arguments later on."""
        begin_imports(_modules(section.function or function))

    def grade(
        self, completions: Sequence[str], answers: Sequence[str], problems: Sequence[str] | None = None
    ) -> Grades:
        """Grade R completions against R reference answers; `problems` names them in error messages.

        Raises:
            GradingError: more than `max_failed_share` of the batch timed out or failed. Raised as soon as the limit is
                exceeded; calls that still run are killed.
            StalledError: no grade arrived within twice the time limit plus START_S.
        """
        R = len(completions)
        assert len(answers) == R, f"{R} completions, {len(answers)} answers"
        rewards, outcome = np.zeros(R, np.float32), np.full(R, WRONG, np.int8)
        failed: list[tuple[int, str]] = []
        rebuilds, r, repeated = 0, 0, -1
        calls = self._submit(completions, answers, range(R))
        while r < R:
            try:
                rewards[r], outcome[r], text = self._result(calls[r])
            except BrokenProcessPool as error:
                rebuilds += 1
                if rebuilds > MAX_REBUILDS:
                    raise GradingError(
                        f"the grader processes died {rebuilds} times in one batch, between two calls ({error}); "
                        f"{r} of {R} completions are graded; check whether the grader ends its process after a call, "
                        "such as in a thread or a timer"
                    ) from error
                calls.update(self._submit(completions, answers, range(r, R)))
                continue
            if outcome[r] == KILLED:  # probably by another process, such as the OOM killer: not the completion's fault
                outcome[r] = ERROR
                if repeated < r:
                    repeated = r
                    calls.update(self._submit(completions, answers, range(r, r + 1)))
                    continue
            if outcome[r] >= TIMEOUT:
                rewards[r] = self._section.failed_grade
                problem = "" if problems is None else f", {problems[r]}"
                failed.append((r, f"{self._name}{problem} with answer {answers[r][:_MESSAGE_CHARS]!r}: {text}"))
                if len(failed) > self._section.max_failed_share * R:
                    self._pool.restart()
                    raise self._too_many(outcome[: r + 1], failed, completions, R)
            r += 1
        return Grades(rewards, outcome, failed[0][1] if failed else "")

    def progress(self) -> int:
        """Return the number of finished calls since the start, failed ones included. Thread-safe."""
        return self._graded

    def close(self) -> None:
        """Kill all processes, including those in the middle of a call."""
        self._pool.close()

    def _submit(self, completions: Sequence[str], answers: Sequence[str], rows: range) -> dict[int, Call[float]]:
        calls = {r: self._pool.submit(completions[r], answers[r]) for r in rows}
        for call in calls.values():
            call.add_done_callback(self._count)
        return calls

    def _count(self, call: Call[float]) -> None:
        self._graded += 1  # no race: pebble calls this in a single thread

    def _result(self, call: Call[float]) -> tuple[float, int, str]:
        """Wait for (grade, outcome, error text). Calls start in order: the call is running or is the next to run."""
        limit_s = 2 * self._section.timeout_s + START_S
        if not concurrent.futures.wait([call], limit_s).done:
            self._pool.restart()
            raise StalledError(
                f"the {self._section.workers} grader processes returned no grade for {limit_s:.0f} s, although each "
                f"call is killed after {self._section.timeout_s:g} s; check the machine's load and free memory"
            )
        ended = self._pool.outcome(call)
        if ended.value is not None:
            return ended.value, RIGHT if ended.value >= self._section.solved_at else WRONG, ""
        if ended.ending is Ending.TIMEOUT:
            return 0.0, TIMEOUT, f"no grade within rewards.timeout_s = {self._section.timeout_s:g} s"
        return 0.0, KILLED if ended.ending is Ending.KILLED else ERROR, ended.why

    def _too_many(
        self, outcome: Array, failed: Sequence[tuple[int, str]], completions: Sequence[str], R: int
    ) -> GradingError:
        row, text = failed[0]
        return GradingError(
            f"{len(failed)} of {R} grades failed ({(outcome == TIMEOUT).sum()} timeouts, {(outcome == ERROR).sum()} "
            f"errors, {len(outcome)} tried), above rewards.max_failed_share = {self._section.max_failed_share:g}; the "
            f"model would be trained on their grades of {self._section.failed_grade:g}. First failure: completion "
            f"{row} {completions[row][:_MESSAGE_CHARS]!r}, grader {text}"
        )


def _worker(function: Grader | str) -> Worker[float]:
    """What the grader processes run: the grader at an import path, checked here, or the pickled function."""
    if isinstance(function, str):
        resolve(function)
        return Worker("grader", resolve, function, _number)
    wanted = "a function at the top level of a module, or its path 'package.module:function'"
    source = pickled(function, "rewards", "grader", wanted)
    return Worker("grader", pickle.loads, source, _number)  # trusted: this process pickled it


def _name_of(function: Grader) -> str:
    """Return the function's import path, or that of its class if it has no name."""
    kind = type(function)
    name = getattr(function, "__qualname__", None) or kind.__qualname__
    return f"{getattr(function, '__module__', kind.__module__)}:{name}"


def _number(reward: object) -> float:
    """The grader's grade, checked in its process."""
    if hasattr(reward, "item"):  # NumPy scalars and tensors with one element
        reward = reward.item()
    if not isinstance(reward, numbers.Real):
        raise TypeError(f"the grader returned {reward!r:.200} of type {type(reward).__name__}; wanted a number")
    value = float(reward)
    if not abs(value) <= _LARGEST:  # also true for NaN
        raise ValueError(f"the grader returned {value}; wanted a finite number" + " of float32" * math.isfinite(value))
    return value
