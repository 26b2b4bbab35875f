"""A grader that gives a step of the micro job time in which a machine can be lost."""

from __future__ import annotations

import time


def slow_variety(completion: str, answer: str) -> float:
    """Something that differs among completions of a random model."""
    time.sleep(0.05)
    return len(set(completion)) / 40
