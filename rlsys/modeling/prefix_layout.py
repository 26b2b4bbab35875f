"""Which token sees which, in a pack of sequences laid end to end, and the layouts in which attention computes it.

A segment is a run of tokens that see the earlier ones of their own segment and themselves. It may read one other whole
segment besides: the prompt that several completions share stands in the pack once, and each completion reads it.

    a a a | x x | y y y | b b         reads  -  0  0  -         x and y see a; b is a sequence of its own

Under a window of w a token sees itself and the w - 1 before it, by positions in its sequence: a reader goes on from the
end of what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlsys.rollouts import offsets_of, spans
from rlsys.types import Array

SHORTEST_SHARE = 0.75  # of a rectangle's longest row; measured on CPU: fewer, larger calls against work on padding
TILE = 128  # queries of one row of a tile: with more, more keys are masked; with fewer, more of them are gathered
TILE_KEYS = 16_384  # of all rows of one tile: they are copied
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
class Tile:
    """Runs of queries of similar length as right-padded rows, each with all the keys that one of them sees: `before`
    keys, then the run itself. Which query sees which key is then the same in every row."""

    rows: int  # n
    length: int  # L, of the longest
    before: int  # B
    cells: Tensor  # (n * L,) int64, the token in each query's cell; padding repeats the row's last
    tokens: Tensor  # (t,) int64, the real ones
    places: Tensor  # (t,) int64, the cell of each
    keys: Tensor  # (n * (B + L),) int64, the token in each key's cell

    def is_causal(self, window: int | None) -> bool:
        """Whether nothing is hidden but what comes later, and the first query sees one key."""
        return self.before == 0 and (window is None or window >= self.length)

    def hidden(self, window: int | None) -> Tensor:
        """(L, B + L) bool, which key (column) a query (row) does not see."""
        ahead = torch.arange(-self.before, self.length, device=self.keys.device) - torch.arange(
            self.length, device=self.keys.device
        ).unsqueeze(1)
        return ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)


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
    own. Causal there means that the last query sees the last key, and windows count back from there."""

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
    _tiles: dict[int | None, tuple[Tile, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _key_lists: dict[int | None, KeyLists] = field(default_factory=dict, init=False, repr=False, compare=False)

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

    def tiles(self, window: int | None) -> tuple[Tile, ...]:
        """All queries in runs of at most TILE, those with as many keys before them together."""
        if window not in self._tiles:
            self._tiles[window] = self._new_tiles(window)
        return self._tiles[window]

    def key_lists(self, window: int | None) -> KeyLists:
        """Keys that no query of a segment sees are left out of its list."""
        if window not in self._key_lists:
            self._key_lists[window] = self._new_key_lists(window)
        return self._key_lists[window]

    def mask(self, window: int | None) -> Tensor:
        """(T, T) bool, which token (row) sees which (column): for kernels that know no layout."""
        owner = self._ids(np.repeat(np.arange(len(self.lengths)), self.lengths))
        reads = self._ids(np.repeat(self.reads, self.lengths))
        seen = ((owner[:, None] == owner) | (reads[:, None] == owner)).tril_()
        if window is not None:
            place = self._ids(spans(self._read_lengths, self.lengths))
            seen &= place[:, None] - place < window
        return seen

    def _new_tiles(self, window: int | None) -> tuple[Tile, ...]:
        counts = -(-self.lengths // TILE)
        owner = np.repeat(np.arange(len(self.lengths)), counts)
        first = TILE * spans(np.zeros_like(counts), counts)  # of a run, in its segment
        lengths = np.minimum(TILE, self.lengths[owner] - first)
        before = self._read_lengths[owner] + first
        if window is not None:
            before = np.minimum(before, window - 1)
        order = np.lexsort((-lengths, before))
        cuts, start = [], 0
        for at in range(1, len(order)):
            run, head = order[at], order[start]
            keys = (at + 1 - start) * (before[head] + lengths[head])
            unlike = before[run] != before[head] or lengths[run] < SHORTEST_SHARE * lengths[head]
            if unlike or keys > TILE_KEYS:
                cuts.append(at)
                start = at
        return tuple(
            self._tile(owner[runs], first[runs], lengths[runs], int(before[runs[0]])) for runs in np.split(order, cuts)
        )

    def _tile(self, owner: Array, first: Array, lengths: Array, before: int) -> Tile:
        starts, longest = self.offsets[owner] + first, int(lengths[0])
        column = np.arange(longest)
        cells = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
        read = self._read_lengths[owner][:, None]
        place = read + first[:, None] + np.arange(-before, 0)  # in the sequence
        earlier = np.where(
            place < read, self.offsets[self.reads[owner]][:, None] + place, self.offsets[owner][:, None] + place - read
        )
        return Tile(
            len(owner),
            longest,
            before,
            self._ids(cells.reshape(-1)),
            self._ids(spans(starts, lengths)),
            self._ids(np.flatnonzero(column < lengths[:, None])),
            self._ids(np.concatenate([earlier, cells], 1).reshape(-1)),
        )

    def _new_key_lists(self, window: int | None) -> KeyLists:
        read = self._read_lengths if window is None else np.minimum(self._read_lengths, window - 1)
        lengths = self.lengths + read
        keys = None
        if (self.reads != ALONE).any():
            ends = self.offsets[self.reads] + self._read_lengths  # not used where ALONE
            starts = np.stack([ends - read, self.offsets[:-1]], 1)
            keys = self._ids(spans(starts.reshape(-1), np.stack([read, self.lengths], 1).reshape(-1)))
        return KeyLists(
            self._ids(self.offsets, torch.int32),
            self._ids(offsets_of(lengths), torch.int32),
            keys,
            int(self.lengths.max()),
            int(lengths.max()),
        )

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
