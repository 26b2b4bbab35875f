"""Graders that jobs of these tests name in `rewards.function`."""

from __future__ import annotations

import time
import zlib


def variety(completion: str, answer: str) -> float:
    """Something that differs among completions of a random model."""
    return len(set(completion)) / 40


def fingerprint(completion: str, answer: str) -> float:
    """In 0 to 1, and another one for another completion or answer."""
    return zlib.crc32(f"{completion}/{answer}".encode()) / 2**32


def cost(completion: str, answer: str) -> float:
    """From -10,000 to 0."""
    return -1e4 * fingerprint(completion, answer)


def slow_variety(completion: str, answer: str) -> float:
    """The same, slow enough for a kill to meet it at work."""
    time.sleep(0.02)
    return variety(completion, answer)


def unwell(completion: str, answer: str) -> float:
    """No number where the answer is 18, as it is of the first held-out problem alone; elsewhere no end."""
    if answer == "18":
        return float("nan")
    time.sleep(3600)
    return 1.0


def sleeper(completion: str, answer: str) -> float:
    time.sleep(3600)
    return 1.0


def raiser(completion: str, answer: str) -> float:
    raise ValueError("this grader has a bug")


def half_agree(completion: str, answer: str) -> float:
    """The groups of about every other answer agree."""
    return 0.5 if int(answer) % 2 else fingerprint(completion, answer)
