"""Which token sees which, in a pack of sequences laid end to end, and the layouts in which attention computes it.

A segment is a run of tokens that see the earlier ones of their own segment and themselves. It may read one other whole
segment besides: the prompt that several completions share stands in the pack once, and each completion reads it.

    a a a | x x | y y y | b b         reads  -  0  0  -         x and y see a; b is a sequence of its own
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlsys.rollouts import offsets_of, spans
from rlsys.types import Array

SHORTEST_SHARE = 0.75  # of a rectangle's longest row; measured on CPU: fewer, larger calls against work on padding
ALONE = -1  # value of Segments.reads


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Segments of similar length as right-padded rows. Causal attention needs no mask then: what pads a row comes last,
    and no real token looks ahead."""

    rows: int  # n
    length: int  # L, of the longest
    span: tuple[int, int] | None  # these tokens of the pack are the cells, in order and without padding
    cells: Tensor  # (n * L,) int64, the token in each cell; padding repeats the row's last
    tokens: Tensor  # (t,) int64, the real ones
    places: Tensor  # (t,) int64, the cell of each


@dataclass(frozen=True, slots=True)
class Reading:
    """The tokens [start:stop] see all of [first:last]."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class KeyLists:
    """For kernels that take queries and keys of each segment end to end: a reader's keys are what it reads, then its
    own. Causal there means that the last query sees the last key."""

    offsets: Tensor  # (S + 1,) int32, of queries
    key_offsets: Tensor  # (S + 1,) int32
    keys: Tensor | None  # (K,) int64, the pack's token of each key; None: keys are the tokens themselves
    longest: int
    longest_keys: int


@dataclass(frozen=True)
class Segments:
    """S segments end to end. Readers of one segment stand side by side."""

    lengths: Array  # (S,) int64, none is 0
    reads: Array  # (S,) int64, number of the segment that this one reads, or ALONE
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.reads) and (self.lengths > 0).all()

    @cached_property
    def offsets(self) -> Array:
        """(S + 1,) int64; segment s is [offsets[s]:offsets[s + 1]]."""
        return offsets_of(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, what it reads included."""
        return int((self.lengths + self._read_lengths).max())

    @cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """All segments, by falling length."""
        order = np.argsort(-self.lengths, kind="stable")
        found, first = [], 0
        while first < len(order):
            lengths = self.lengths[order[first:]]
            last = first + int((lengths >= SHORTEST_SHARE * lengths[0]).sum())
            found.append(self._rectangle(order[first:last]))
            first = last
        return tuple(found)

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """One for each segment that is read."""
        readers = np.flatnonzero(self.reads != ALONE)
        read, at = np.unique(self.reads[readers], return_index=True)
        counts = np.bincount(self.reads[readers], minlength=len(self.lengths))[read]
        firsts = readers[at]
        assert (self.reads[spans(firsts, counts)] == np.repeat(read, counts)).all()  # side by side
        starts, stops = self.offsets[firsts], self.offsets[firsts + counts]
        columns = (starts, stops, self.offsets[read], self.offsets[read + 1])
        return tuple(Reading(*map(int, row)) for row in zip(*columns, strict=True))

    @cached_property
    def key_lists(self) -> KeyLists:
        lengths = self.lengths + self._read_lengths
        keys = None
        if (self.reads != ALONE).any():
            starts = np.stack([self.offsets[self.reads], self.offsets[:-1]], 1)  # the first is not used where ALONE
            keys = self._ids(spans(starts.reshape(-1), np.stack([self._read_lengths, self.lengths], 1).reshape(-1)))
        return KeyLists(
            self._ids(self.offsets, torch.int32),
            self._ids(offsets_of(lengths), torch.int32),
            keys,
            int(self.lengths.max()),
            int(lengths.max()),
        )

    def mask(self) -> Tensor:
        """(T, T) bool, which token (row) sees which (column): for kernels that know no layout."""
        owner = self._ids(np.repeat(np.arange(len(self.lengths)), self.lengths))
        reads = self._ids(np.repeat(self.reads, self.lengths))
        return ((owner[:, None] == owner) | (reads[:, None] == owner)).tril_()

    @cached_property
    def _read_lengths(self) -> Array:
        """(S,) tokens that each segment reads besides its own."""
        lengths: Array = np.where(self.reads != ALONE, self.lengths[self.reads], 0)
        return lengths

    def _rectangle(self, members: Array) -> Rectangle:
        lengths, starts = self.lengths[members], self.offsets[members]
        rows, longest, total = len(members), int(lengths[0]), int(lengths.sum())
        column = np.arange(longest)
        cells = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
        whole = total == rows * longest and (np.diff(starts) == longest).all()
        return Rectangle(
            rows,
            longest,
            (int(starts[0]), int(starts[0]) + total) if whole else None,
            self._ids(cells.reshape(-1)),
            self._ids(spans(starts, lengths)),
            self._ids(np.flatnonzero(column < lengths[:, None])),
        )

    def _ids(self, array: Array, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(array).to(self.device, dtype)


def alone(lengths: Array, device: torch.device | str = "cpu") -> Segments:
    """Sequences of these lengths that share nothing."""
    lengths = np.asarray(lengths, np.int64)
    return Segments(lengths, np.full(len(lengths), ALONE), device)
