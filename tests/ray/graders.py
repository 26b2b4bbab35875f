"""Graders that jobs of these tests name in `rewards.function`."""

from __future__ import annotations

import time


def variety(completion: str, answer: str) -> float:
    """Something that differs among completions of a random model."""
    return len(set(completion)) / 40


def slow_variety(completion: str, answer: str) -> float:
    """The same, slow enough for a kill to meet it at work."""
    time.sleep(0.02)
    return variety(completion, answer)


def sleeper(completion: str, answer: str) -> float:
    time.sleep(3600)
    return 1.0


def raiser(completion: str, answer: str) -> float:
    raise ValueError("this grader has a bug")
