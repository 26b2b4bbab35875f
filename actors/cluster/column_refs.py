"""Columns on their way between actors: they stay where they were made, and who orders the work holds references.

Ray fetches references that stand as arguments themselves, not those inside of one; so several lists go flat, with their
sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Ray sends results below a size to who made the call, and from there with every call that they are passed on to: the
# driver would carry each small batch several times. A sampler's counts have fewer bytes than this, its columns more.
INLINE_BYTES = 512


def by_reference(options: Mapping[str, Any]) -> dict[str, Any]:
    """An actor's options, with its results left in its node's object store unless they are but a few figures.

    An actor reads Ray's limit (100 KB by default) from its own process's environment.
    """
    env = options.get("runtime_env", {})
    variables = {**env.get("env_vars", {}), "RAY_max_direct_call_object_size": str(INLINE_BYTES)}
    return {**options, "runtime_env": {**env, "env_vars": variables}}


def split(sizes: Sequence[int], flat: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The lists again: sizes 2 1, flat a b c -> (a, b) (c,)."""
    parts, start = [], 0
    for size in sizes:
        parts.append(tuple(flat[start : start + size]))
        start += size
    assert start == len(flat)
    return parts
