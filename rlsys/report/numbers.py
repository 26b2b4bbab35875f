"""Formats numbers for the report, and computes axis ticks and coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Linear map from [low, high] to [start, end]; if low equals high, everything maps to the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def nice_ticks(low: float, high: float, wanted: int = 4, whole: bool = False) -> list[float]:
    """Round axis ticks that cover [low, high]; their spacing is 1, 2 or 5 times a power of ten."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        if whole:
            return [low]
        low, high = low - room, high + room
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    gap = max(gap, 1.0) if whole else gap
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [mark * gap for mark in range(first, last + 1)]


def number(value: float) -> str:
    """Short text of a number: ``0``, ``0.0123``, ``1.5e-7``, ``12``, ``1830``; with more digits near 1: ``1.00042``."""
    if not math.isfinite(value):
        return "not finite"
    if value != 1 and abs(value - 1) < 0.01:
        return f"{value:.6f}".rstrip("0").rstrip(".")
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.3g}"
    return _power(f"{value:.1e}")


def tick_labels(marks: Sequence[float]) -> list[str]:
    """Tick labels with as many decimals as needed to distinguish neighbours."""
    gap = marks[1] - marks[0] if len(marks) > 1 else 1.0
    if 0 < max(abs(mark) for mark in marks) < 1e-3:
        return [_power(f"{mark:.0e}") if mark else "0" for mark in marks]
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{mark:.{decimals}f}" for mark in marks]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "not finite"


def _power(scientific: str) -> str:
    """``1.5e-07`` -> ``1.5e-7``"""
    mantissa, exponent = scientific.split("e")
    return f"{mantissa}e{int(exponent)}"
