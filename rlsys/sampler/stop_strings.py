"""Stop strings that lie across two requests of one completion: the engine looks at each request's text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def stop_across(
    decode: Callable[[list[int]], str], before: list[int], after: list[int], strings: Sequence[str]
) -> int | None:
    """How many tokens of `after` it takes to complete a stop string that begins in `before`; None: none does.

    before ..>   after > = 4   strings >>   ->   1
    """
    seam, longest = len(decode(before)), max(map(len, strings))
    for count in range(1, len(after) + 1):
        text = decode(before + after[:count])
        starts = [text.find(string, max(0, seam - len(string))) for string in strings]
        if any(0 <= start < seam for start in starts):
            return count
        if len(text) >= seam + longest - 1:
            return None
    return None
