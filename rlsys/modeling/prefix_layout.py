"""Attention pattern of a pack (sequences end to end, with shared prompts), and the layouts in which it is computed.

A token attends to itself and to earlier tokens of its segment. A segment can also read one other segment completely: a
prompt that several completions share is in the pack once, and each completion reads it.

    a a a | x x | y y y | b b         reads  -  0  0  -         x and y attend to a; b is independent

With a sliding window of w a token attends to itself and to the w - 1 tokens before it in its sequence, where a reader
continues the segment that it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlsys.rollouts import offsets_of, spans
from rlsys.types import Array

SHORTEST_SHARE = 0.75  # shortest / longest row of a rectangle; measured on CPU: fewer kernel calls against more padding
TILE = 128  # queries per row of a tile: larger tiles mask more keys, smaller tiles gather more keys
TILE_KEYS = 16_384  # maximum keys of one tile, which are copied
ALONE = -1  # value of Segments.reads


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Segments of similar length as right-padded rows. Causal attention needs no mask for the padding: it comes last,
    and no real token attends to later positions."""

    rows: int  # n
    length: int  # L, of the longest segment
    span: tuple[int, int] | None  # range of the pack that equals the cells in order; None: padded or not contiguous
    cells: Tensor  # (n * L,) int64, token of each cell; padding repeats the last token of the row
    tokens: Tensor  # (t,) int64, tokens without padding
    places: Tensor  # (t,) int64, cell of each of these tokens


@dataclass(frozen=True, slots=True)
class Tile:
    """Blocks of queries of similar length as right-padded rows, each with all keys that its queries attend to: `before`
    earlier keys, then those of the block. So all rows have the same mask."""

    rows: int  # n
    length: int  # L, of the longest block
    before: int  # B
    cells: Tensor  # (n * L,) int64, token of each query cell; padding repeats the last token of the row
    tokens: Tensor  # (t,) int64, query tokens without padding
    places: Tensor  # (t,) int64, cell of each of these tokens
    keys: Tensor  # (n * (B + L),) int64, token of each key cell

    def is_causal(self, window: int | None) -> bool:
        """Whether plain causal attention is correct: no earlier keys, and no key outside of the window."""
        return self.before == 0 and (window is None or window >= self.length)

    def hidden(self, window: int | None) -> Tensor:
        """(L, B + L) bool, whether a key (column) is masked for a query (row)."""
        ahead = torch.arange(-self.before, self.length, device=self.keys.device) - torch.arange(
            self.length, device=self.keys.device
        ).unsqueeze(1)
        return ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens [start:stop] of the pack attend to all tokens [first:last]."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class KeyLists:
    """Layout for variable-length kernels: queries and keys of all segments end to end. The keys of a reader are those
    of the segment that it reads, then its own. The kernel aligns the last query with the last key, and windows count
    back from there."""

    offsets: Tensor  # (S + 1,) int32, of queries
    key_offsets: Tensor  # (S + 1,) int32
    keys: Tensor | None  # (K,) int64, token of each key; None: keys are the tokens of the pack in order
    longest: int
    longest_keys: int


@dataclass(frozen=True)
class Segments:
    """S segments end to end. All readers of a segment are adjacent."""

    lengths: Array  # (S,) int64, at least 1
    reads: Array  # (S,) int64, index of the segment that this segment reads, or ALONE
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
        """Tokens of the longest sequence, including the segment that it reads."""
        return int((self.lengths + self._read_lengths).max())

    @cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """All segments as rectangles, sorted by decreasing length."""
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
        """One Reading for each segment that others read."""
        readers = np.flatnonzero(self.reads != ALONE)
        read, at = np.unique(self.reads[readers], return_index=True)
        counts = np.bincount(self.reads[readers], minlength=len(self.lengths))[read]
        firsts = readers[at]
        assert (self.reads[spans(firsts, counts)] == np.repeat(read, counts)).all()  # side by side
        starts, stops = self.offsets[firsts], self.offsets[firsts + counts]
        columns = (starts, stops, self.offsets[read], self.offsets[read + 1])
        return tuple(Reading(*map(int, row)) for row in zip(*columns, strict=True))

    def tiles(self, window: int | None) -> tuple[Tile, ...]:
        """All queries in blocks of at most TILE; blocks with the same number of earlier keys share a tile."""
        if window not in self._tiles:
            self._tiles[window] = self._new_tiles(window)
        return self._tiles[window]

    def key_lists(self, window: int | None) -> KeyLists:
        """Keys of each segment, without keys outside of the window of all its queries."""
        if window not in self._key_lists:
            self._key_lists[window] = self._new_key_lists(window)
        return self._key_lists[window]

    def mask(self, window: int | None) -> Tensor:
        """(T, T) bool, whether a token (row) attends to another (column), for kernels that take a mask."""
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
        first = TILE * spans(np.zeros_like(counts), counts)  # start of a block in its segment
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
        """(S,) length of the segment that each segment reads; 0 for ALONE."""
        lengths: Array = np.where(self.reads != ALONE, self.lengths[self.reads], 0)
        return lengths

    def _rectangle(self, members: Array) -> Rectangle:
        lengths, starts = self.lengths[members], self.offsets[members]
        rows, longest, total = len(members), int(lengths[0]), int(lengths.sum())
        column = np.arange(longest)
        cells = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
        contiguous = total == rows * longest and (np.diff(starts) == longest).all()
        return Rectangle(
            rows,
            longest,
            (int(starts[0]), int(starts[0]) + total) if contiguous else None,
            self._ids(cells.reshape(-1)),
            self._ids(spans(starts, lengths)),
            self._ids(np.flatnonzero(column < lengths[:, None])),
        )

    def _ids(self, array: Array, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(array).to(self.device, dtype)


def alone(lengths: Array, device: torch.device | str = "cpu") -> Segments:
    """Segments of these lengths without shared prompts."""
    lengths = np.asarray(lengths, np.int64)
    return Segments(lengths, np.full(len(lengths), ALONE), device)
