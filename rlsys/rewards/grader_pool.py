"""Graders run in processes of their own, each call killed when its time is up.

A wrong answer, a call that ran out of time and a call that failed are three different outcomes: the first is a fact
about the model, the others are faults of the grader, and a batch in which they prevail must not become zeros to train
on.
"""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import numbers
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from pebble import ProcessExpired, ProcessPool

from rlsys.config import RewardSection
from rlsys.errors import ConfigError, GradingError, StalledError
from rlsys.sandbox.killable_process import TEXT_TAIL, describe_exit, init_killable_process
from rlsys.types import Array
from rlsys.utils.import_path import import_by_path

RIGHT, WRONG, TIMEOUT, ERROR = 0, 1, 2, 3  # values of Grades.outcome
KILLED = 4  # no outcome: the grade is repeated, and counts as ERROR when that happens to it again

Grader = Callable[[str, str], float]

# Beyond two time limits, what the next grade may need: processes to start, with a grader's own heavy imports.
START_S = 120.0
# Rebuilding a broken pool, per batch. Pebble gives a pool up when its only process dies outside a call.
MAX_REBUILDS = 3
_HEAD = 200  # characters of a completion that an error shows
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Grades:
    """R completions' rewards, any finite ones. RIGHT is one of rewards.solved_at or more; TIMEOUT and ERROR have
    rewards.failed_grade."""

    rewards: Array  # (R,) float32
    outcome: Array  # (R,) int8
    first_error: str  # of the first TIMEOUT or ERROR, with grader, problem and traceback's tail; "" without one

    def counts(self) -> dict[str, float]:
        """Metrics, each a number of completions."""
        return {
            "reward/wrong": float((self.outcome == WRONG).sum()),
            "reward/timeouts": float((self.outcome == TIMEOUT).sum()),
            "reward/errors": float((self.outcome == ERROR).sum()),
        }


def resolve(path: str) -> Grader:
    """The function that 'package.module:function' names.

    Raises:
        ConfigError: the path has another form, the module does not import, or has no such function.
    """
    found = import_by_path(path, "rewards.function", "'package.module:function'")
    if not callable(found):
        raise ConfigError(f"rewards.function: {path!r} is a {type(found).__name__}; wanted a function")
    function: Grader = found
    return function


class GraderPool:
    """`section.workers` processes that call `section.function`, or else `function`, on (completion, answer).

    A function given as such has to be picklable: one at the top level of a module, a static method, or a method of a
    picklable object. A batch takes at most timeout_s times the number of calls that fail, per process.
    """

    def __init__(self, section: RewardSection, function: Grader | str) -> None:
        function = section.function or function
        self._section = section
        self._source = _source(function)
        self._name = function if isinstance(function, str) else _name_of(function)
        # Fork would copy the locks of this process' threads. The fork server imports these modules once, so that the
        # process that replaces a killed one is there soon.
        module = function.partition(":")[0] if isinstance(function, str) else function.__module__
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, module])
        self._graded = 0
        self._pool = self._start()

    def grade(
        self, completions: Sequence[str], answers: Sequence[str], problems: Sequence[str] | None = None
    ) -> Grades:
        """Grade R completions, each against the answer beside it. `problems`: what errors call them.

        Raises:
            GradingError: more than `max_failed_share` of the batch ran out of time or failed; raised as soon as it is
                sure, and what still runs is killed.
            StalledError: the processes gave no answer for far longer than a grade may take.
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
                        f"the grader processes died {rebuilds} times in one batch outside of a grade ({error}); "
                        f"{r} of {R} completions are graded; look for a grader that ends its process later"
                    ) from error
                calls.update(self._submit(completions, answers, range(r, R)))
                continue
            if outcome[r] == KILLED:  # from outside, it seems: its zero would not be the completion's fault
                outcome[r] = ERROR
                if repeated < r:
                    repeated = r
                    calls.update(self._submit(completions, answers, range(r, r + 1)))
                    continue
            if outcome[r] >= TIMEOUT:
                rewards[r] = self._section.failed_grade
                of = "" if problems is None else f", {problems[r]}"
                failed.append((r, f"{self._name}{of} with answer {answers[r][:_HEAD]!r}: {text}"))
                if len(failed) > self._section.max_failed_share * R:
                    self._pool = self._restart()
                    raise self._too_many(outcome[: r + 1], failed, completions, R)
            r += 1
        return Grades(rewards, outcome, failed[0][1] if failed else "")

    def progress(self) -> int:
        """Grades that have ended since the start, however; another thread may ask while a batch is being graded."""
        return self._graded

    def close(self) -> None:
        """Kill the processes, whatever they do."""
        self._pool.stop()
        while True:
            try:
                return self._pool.join()
            except KeyError:  # pebble's own thread took away a process that it was about to stop; others may be left
                continue

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            self._section.workers,
            initializer=_initialise,
            initargs=(self._source,),
            context=self._context,
        )
        assert pool.active  # asking starts the processes: they import while the caller prepares its first batch
        return pool

    def _restart(self) -> ProcessPool:
        self.close()
        return self._start()

    def _submit(
        self, completions: Sequence[str], answers: Sequence[str], rows: range
    ) -> dict[int, concurrent.futures.Future[_Answer]]:
        if not self._pool.active:
            self._pool = self._restart()
        timeout = self._section.timeout_s
        calls = {r: self._pool.schedule(_grade_one, (completions[r], answers[r]), timeout=timeout) for r in rows}
        for call in calls.values():
            call.add_done_callback(self._count)
        return calls

    def _count(self, call: concurrent.futures.Future[_Answer]) -> None:
        self._graded += 1  # only pebble's one thread that takes in results does this

    def _result(self, call: concurrent.futures.Future[_Answer]) -> tuple[float, int, str]:
        """(reward, outcome, text of the failure). Calls start in order, so this one is running or next."""
        limit_s = 2 * self._section.timeout_s + START_S
        if not concurrent.futures.wait([call], limit_s).done:
            self._pool = self._restart()
            raise StalledError(
                f"the {self._section.workers} grader processes gave no answer for {limit_s:.0f} s, though a grade is "
                f"killed after {self._section.timeout_s:g} s; look at the machine's load and memory"
            )
        error = call.exception()
        if error is None:
            reward, text = call.result()
            return (
                (reward, RIGHT if reward >= self._section.solved_at else WRONG, "") if not text else (0.0, ERROR, text)
            )
        if isinstance(error, BrokenProcessPool):
            raise error
        if isinstance(error, TimeoutError):
            return 0.0, TIMEOUT, f"no reward within rewards.timeout_s = {self._section.timeout_s:g} s"
        if isinstance(error, ProcessExpired):
            killed = error.exitcode == -signal.SIGKILL
            return 0.0, KILLED if killed else ERROR, f"the grader's process died: {describe_exit(error.exitcode)}"
        raise error

    def _too_many(
        self, outcome: Array, failed: Sequence[tuple[int, str]], completions: Sequence[str], R: int
    ) -> GradingError:
        row, text = failed[0]
        return GradingError(
            f"{len(failed)} of {R} grades failed ({(outcome == TIMEOUT).sum()} timeouts, {(outcome == ERROR).sum()} "
            f"errors, {len(outcome)} tried), above rewards.max_failed_share = {self._section.max_failed_share:g}: "
            f"their grades of {self._section.failed_grade:g} would be trained on. The first, for completion {row} "
            f"{completions[row][:_HEAD]!r}, of {text}"
        )


def _source(function: Grader | str) -> str | bytes:
    """What a grader process loads its function from: the path, found good here, or the function pickled."""
    if isinstance(function, str):
        resolve(function)
        return function
    try:
        return pickle.dumps(function)
    except Exception as error:  # pickling runs the object's own code
        raise ConfigError(
            f"rewards: {function!r} cannot be sent to the grader processes ({error}); "
            "wanted a function at the top level of a module, or its path 'package.module:function'"
        ) from error


def _name_of(function: Grader) -> str:
    """As rewards.function would name it, as far as it has a name."""
    kind = type(function)
    name = getattr(function, "__qualname__", None) or kind.__qualname__
    return f"{getattr(function, '__module__', kind.__module__)}:{name}"


_Answer = tuple[float, str]  # reward, and the text of the exception if there was one
_grader: Grader | None = None  # of this grader process
_start_error = ""


def _initialise(source: str | bytes) -> None:
    """Runs once in each grader process; one that cannot load its grader lives on to say so."""
    global _grader, _start_error
    init_killable_process()
    try:
        _grader = resolve(source) if isinstance(source, str) else pickle.loads(source)  # our owner pickled it
    except Exception:  # an import of the user's may raise anything
        _start_error = traceback.format_exc()[-TEXT_TAIL:]


def _grade_one(completion: str, answer: str) -> _Answer:
    """Runs in a grader process. Failures come back as text: not every exception survives pickling."""
    if _grader is None:
        return 0.0, f"the grader could not be loaded: {_start_error}"
    try:
        return _number(_grader(completion, answer)), ""
    except BaseException:  # also SystemExit, and what libraries derive from BaseException
        return 0.0, traceback.format_exc()[-TEXT_TAIL:]


def _number(reward: object) -> float:
    if hasattr(reward, "item"):  # numpy scalars, tensors of one element
        reward = reward.item()
    if not isinstance(reward, numbers.Real):
        raise TypeError(f"the grader returned {reward!r:.200} of type {type(reward).__name__}; wanted a number")
    value = float(reward)
    if not abs(value) <= _LARGEST:  # nor is NaN
        raise ValueError(f"the grader returned {value}; wanted a finite number" + " of float32" * math.isfinite(value))
    return value
