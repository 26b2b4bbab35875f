"""Several lists of references as the arguments of one call: Ray fetches those that stand there, not those inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def split(sizes: Sequence[int], flat: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The lists again: sizes 2 1, flat a b c -> (a, b) (c,)."""
    parts, start = [], 0
    for size in sizes:
        parts.append(tuple(flat[start : start + size]))
        start += size
    assert start == len(flat)
    return parts
