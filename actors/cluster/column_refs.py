"""Columns between actors: they stay in the object store of the node that made them, and the driver holds references.

Ray resolves references that are arguments themselves, not those inside of an argument. So lists of references travel
flat, beside their lengths: ``pack_columns`` at the caller, ``unpack_columns`` at the actor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlsys.protocols import Ref

# Ray inlines results below a size: they travel through the caller, and with every call that they are passed on to. The
# driver would carry each small batch several times. A sampler's counts have fewer bytes than this, its columns more.
INLINE_BYTES = 512

BaseRef = str | Ref[Mapping[str, bytes]]  # folder or hub name that every node can read, or a packed folder


def by_reference(options: Mapping[str, object]) -> dict[str, object]:
    """An actor's options, with results above a few numbers left in its node's object store.

    An actor reads Ray's limit (100 KB by default) from the environment of its process.
    """
    env = options.get("runtime_env", {})
    assert isinstance(env, Mapping)
    variables = {**env.get("env_vars", {}), "RAY_max_direct_call_object_size": str(INLINE_BYTES)}
    return {**options, "runtime_env": {**env, "env_vars": variables}}


def base_argument(base: BaseRef) -> object:
    """A base as an argument of an actor's method: Ray resolves the reference."""
    return base.value if isinstance(base, Ref) else base


# Any: a call packs columns of several types, whose number and order differ from call to call.
def pack_columns(*columns: Sequence[Ref[Any]]) -> tuple[tuple[int, ...], list[object]]:
    """(lengths, Ray's references end to end): (a, b) (c,) -> (2, 1), [a, b, c]."""
    return tuple(len(column) for column in columns), [ref.value for column in columns for ref in column]


def unpack_columns(lengths: Sequence[int], values: Sequence[object]) -> list[tuple[Any, ...]]:
    """The columns again, resolved: (2, 1), [a, b, c] -> (a, b) (c,)."""
    columns, start = [], 0
    for length in lengths:
        columns.append(tuple(values[start : start + length]))
        start += length
    assert start == len(values)
    return columns
