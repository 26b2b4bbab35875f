"""Graders for the tests of the pool, in a light module because each grader process imports it."""

import ctypes
import os
import signal
import sys
import time
from functools import partial
from typing import Any

import numpy as np


class AwkwardError(Exception):
    """Cannot be unpickled: its constructor takes two arguments and its args hold none."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()


def obedient(completion: str, answer: str) -> Any:
    """Does what the completion says; otherwise 1 for an equal answer."""
    match completion:
        case "sleep":
            time.sleep(1e5)
        case "long call into C":
            # Locks a mutex twice: no signal ends the call, and it holds the interpreter's lock without computing.
            mutex, libc = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
            return [libc.pthread_mutex_lock(mutex) for _ in range(2)]
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "memory":
            return len(bytearray(2**33))
        case "raise":
            raise RuntimeError("no such luck")
        case "raise awkwardly":
            raise AwkwardError("a", "b")
        case "nan":
            return float("nan")
        case "infinite":
            return float("inf")
        case "text":
            return "1.0"
        case "none":
            return None
        case "half":
            return np.float32(0.5)
        case "true":
            return True
        case "minus one":
            return -1
        case "pid":
            return os.getpid() / 2**24
    return float(completion == answer)


def numbers(completion: str, answer: str) -> float:
    """The number that the completion is."""
    return float(completion)


def killed_once(completion: str, answer: str) -> Any:
    """The completion names a file; without it, the process makes it and is killed."""
    try:
        with open(completion, "x"):
            os.kill(os.getpid(), signal.SIGKILL)
    except FileExistsError:
        return float(answer)
    return 0.0


class Stateful:
    def __init__(self, bonus: float) -> None:
        self.bonus = bonus

    def grade(self, completion: str, answer: str) -> float:
        return self.bonus


bonus_of_three = partial(lambda bonus, completion, answer: bonus, 3.0)  # found by its path, though it cannot be pickled
not_a_function = 5
