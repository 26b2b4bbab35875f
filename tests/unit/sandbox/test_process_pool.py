"""How a call of a function in a pool of processes can end, and that the pool serves the next call."""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from rlsys.errors import ConfigError
from rlsys.sandbox.process_pool import Ending, Outcome, ProcessPool, Worker, pickled
from tests.waiting import FAR_S, times

TIMEOUT_S = 2.0  # on a machine that does nothing else


def obey(order: str) -> object:
    if order == "sleep":
        time.sleep(FAR_S)
    if order == "leave":
        os._exit(3)
    if order == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid() if order == "pid" else 1 // int(order)


def whole(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"wanted a whole number, found {value}")
    return value


def refuse(source: str | bytes) -> Callable[[str], object]:
    raise ImportError(f"no {source!r} here")


def ended(pool: ProcessPool[int], order: str) -> Outcome[int]:
    call = pool.submit(order)
    concurrent.futures.wait([call])
    return pool.outcome(call)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool[int]]:
    made = ProcessPool(Worker("counter", pickle.loads, pickle.dumps(obey), whole), 1, TIMEOUT_S * times(), [__name__])
    yield made
    made.close()


@pytest.mark.parametrize(
    ("order", "ending", "why"),
    [
        ("1", Ending.VALUE, ""),
        ("0", Ending.FAULT, "ZeroDivisionError"),
        ("-1", Ending.FAULT, "wanted a whole number, found -1"),
        ("sleep", Ending.TIMEOUT, ""),
        ("leave", Ending.DIED, "the counter process died: exit code 3"),
        ("killed", Ending.KILLED, "the counter process died: signal 9"),
    ],
)
def test_a_call_ends_in_one_of_five_ways_and_the_next_one_is_served(
    pool: ProcessPool[int], order: str, ending: Ending, why: str
) -> None:
    outcome = ended(pool, order)
    assert outcome.ending is ending and why in outcome.why
    assert (outcome.value is not None) == (ending is Ending.VALUE) and bool(outcome.why) == bool(why)
    assert ended(pool, "1") == Outcome(Ending.VALUE, 1)


def test_a_restart_ends_the_processes_and_starts_others(pool: ProcessPool[int]) -> None:
    before = ended(pool, "pid").value
    pool.submit("sleep")
    pool.restart()
    assert before is not None and ended(pool, "pid").value != before
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_a_function_that_cannot_be_loaded_is_the_fault_of_every_call() -> None:
    made = ProcessPool(Worker("counter", refuse, "dice", whole), 1, TIMEOUT_S * times(), [__name__])
    try:
        for _ in range(2):
            outcome = ended(made, "1")
            assert outcome.ending is Ending.FAULT
            assert "the counter could not be loaded" in outcome.why and "no 'dice' here" in outcome.why
    finally:
        made.close()


def test_a_function_that_cannot_be_pickled_is_refused_with_what_would_be_right() -> None:
    with pytest.raises(ConfigError, match=r"^task: .* cannot be sent to the counter processes .*; wanted a method$"):
        pickled(lambda: 1, "task", "counter", "a method")
