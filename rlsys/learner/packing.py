"""Packs a batch into micro-batches: sequences end to end, no padding, at most ``token_budget`` tokens each.

Losses are sums over tokens, so packing changes neither values nor gradients, only speed and memory. Neighbours with the
same first tokens, such as completions of one prompt, may share them as a prefix group: the prefix is in the pack once,
and the model runs over it once, forward and backward.

    datums       p p a a a    p p b        ->   tokens    p p | a a a | b       reads  - 0 0
    wanted         ^ ^ ^ ^      ^ ^             rows      1 2 3 4   1 5         of the hidden states

Log-probabilities are computed only where `wanted_T` says: prompts need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlsys.datums import DatumBatch
from rlsys.modeling.prefix_layout import ALONE, Segments
from rlsys.rollouts import offsets_of, spans
from rlsys.types import Array

LEAST_SAVED = 16  # tokens; a prefix group that saves fewer costs more by its additional attention call


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Datums in one pack that share their first tokens; a single datum shares none."""

    datums: Array  # (n,) int64, ascending
    shared: int  # tokens
    cost: int  # tokens that the model runs over


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """U tokens packed for the model, and the T positions of the batch that they predict."""

    index: Array  # (T,) int64, position in the batch of each prediction; empty for a filler
    tokens: Tensor  # (1, U) int64
    positions: Tensor  # (1, U) int64, from 0 within each sequence
    rows: Tensor | None  # (T,) int64, token that makes each prediction; None: all in order
    targets: Tensor  # (T,) int64
    segments: Segments

    def scatter(self, column_T: Array, values: Tensor) -> None:
        """Write the micro-batch's values to their positions in the batch's column; a filler has none."""
        if len(self.index):
            column_T[self.index] = values.detach().cpu().numpy()


def prefix_groups(batch: DatumBatch, wanted_T: Array | None, limit: int, *, share: bool) -> list[PrefixGroup]:
    """Groups of all datums with a wanted position (None: all positions). A group has at most `limit` tokens, unless a
    single sequence is longer."""
    wanted = batch.lengths > 0
    if wanted_T is not None:
        before = offsets_of(wanted_T)
        wanted = before[batch.offsets[1:]] > before[batch.offsets[:-1]]
    datums = np.flatnonzero(wanted)
    lengths = batch.lengths[datums]
    if len(datums) == 0:
        return []
    common = _common_beginnings(batch, datums) if share else np.zeros(len(datums) - 1, np.int64)
    found = []
    for first, last, shared in _runs(common):
        if (last - first - 1) * shared < LEAST_SAVED:
            found += [PrefixGroup(datums[d : d + 1], 0, int(lengths[d])) for d in range(first, last)]
        else:
            own = lengths[first:last] - shared
            cuts = _even_cuts(own, limit - shared)
            parts = zip(np.split(datums[first:last], cuts), np.split(own, cuts), strict=True)
            found += [
                PrefixGroup(part, shared if len(part) > 1 else 0, shared + int(sizes.sum())) for part, sizes in parts
            ]
    return found


def _common_beginnings(batch: DatumBatch, datums: Array) -> Array:
    """(D - 1,) number of first tokens that neighbours share; each keeps at least one token unshared."""
    starts = batch.offsets[datums]
    common: Array = np.minimum(batch.lengths[datums][:-1], batch.lengths[datums][1:]) - 1
    compared = offsets_of(common)
    differs = np.flatnonzero(batch.tokens[spans(starts[:-1], common)] != batch.tokens[spans(starts[1:], common)])
    pair, at = np.unique(np.searchsorted(compared, differs, side="right") - 1, return_index=True)
    common[pair] = differs[at] - compared[pair]
    return common


def _runs(common: Array) -> list[tuple[int, int, int]]:
    """(first, last, shared) of neighbours that share a beginning, in order; each sequence is in one.

    The next sequence joins where all of them then save more tokens than they did without it. So groups that only have a
    few-shot header in common stay apart, and a word with which two completions begin does not hold off the third.
    """
    runs, first, shared = [], 0, 0
    for at, length in enumerate(map(int, common), start=1):
        count = at - first
        joined = min(shared, length) if count > 1 else length
        if count * joined > (count - 1) * shared:
            shared = joined
        else:
            runs.append((first, at, shared if count > 1 else 0))
            first, shared = at, 0
    return [*runs, (first, len(common) + 1, shared if len(common) + 1 - first > 1 else 0)]


def _even_cuts(sizes: Array, limit: int) -> Array:
    """Where to cut a list into parts of about the same sum, at most `limit` unless a single size exceeds it."""
    sums = np.cumsum(sizes)
    parts = -(-int(sums[-1]) // max(1, limit))
    while parts < len(sizes):
        cuts = np.unique(np.searchsorted(sums, np.arange(1, parts) * sums[-1] / parts, side="right"))
        cuts = cuts[cuts > 0]  # the first may be larger than an even part
        if max(int(part.sum()) for part in np.split(sizes, cuts)) <= limit:
            return cuts
        parts += 1
    return np.arange(1, len(sizes))


def bins(costs: Array, token_budget: int) -> list[Array]:
    """Indices per bin, by first-fit decreasing. Indices with cost 0 are in no bin."""
    members: list[list[int]] = []
    room: list[int] = []
    for number in np.argsort(-costs, kind="stable"):
        cost = int(costs[number])
        if cost == 0:
            break
        fit = next((at for at, free in enumerate(room) if free >= cost), None)
        if fit is None:
            fit = len(room)
            members.append([])
            room.append(token_budget)
        members[fit].append(int(number))
        room[fit] -= cost
    return [np.asarray(numbers, np.int64) for numbers in members]


def micro_batch(
    batch: DatumBatch, members: Sequence[PrefixGroup], wanted_T: Array | None = None, device: torch.device | str = "cpu"
) -> MicroBatch:
    """Prefix groups as one pack."""
    datums = np.concatenate([group.datums for group in members])
    counts = np.array([len(group.datums) for group in members])
    shared = np.array([group.shared for group in members])
    lengths, starts, shared_D = batch.lengths[datums], batch.offsets[datums], np.repeat(shared, counts)

    # Segments, group by group: the shared prefix (empty for a single datum), then the rest of each datum.
    first_datum = np.cumsum(counts) - counts
    order = np.insert(np.arange(len(datums)) + len(members), first_datum, np.arange(len(members)))
    sizes = np.concatenate([shared, lengths - shared_D])[order]
    sources = np.concatenate([starts[first_datum], starts + shared_D])[order]
    places = np.concatenate([np.zeros_like(shared), shared_D])[order]
    heads = first_datum + np.arange(len(members))  # number of each family's shared segment
    reads = np.concatenate([np.full(len(members), ALONE), np.where(shared_D > 0, np.repeat(heads, counts), ALONE)])[
        order
    ]
    begins = (np.cumsum(sizes) - sizes)[np.argsort(order)]  # in the pack: of shared parts, then of own parts

    real = sizes > 0
    renumbered = np.cumsum(real) - 1
    reads = np.where(reads[real] == ALONE, ALONE, renumbered[reads[real]])
    source = spans(sources[real], sizes[real])

    index = spans(starts, lengths)
    place = index - np.repeat(starts, lengths)
    in_shared = place < np.repeat(shared_D, lengths)
    rows = place + np.where(
        in_shared,
        np.repeat(np.repeat(begins[: len(members)], counts), lengths),
        np.repeat(begins[len(members) :] - shared_D, lengths),
    )
    if wanted_T is not None:
        chosen = wanted_T[index]
        index, rows = index[chosen], rows[chosen]
    each_in_turn = len(rows) == len(source) and bool((rows == np.arange(len(rows))).all())
    return MicroBatch(
        index,
        _ids(batch.tokens[source], device)[None],
        _ids(spans(places[real], sizes[real]), device)[None],
        None if each_in_turn else _ids(rows, device),
        _ids(batch.targets[index], device),
        Segments(sizes[real], reads, device),
    )


def filler(device: torch.device | str = "cpu") -> MicroBatch:
    """A micro-batch of one token without predictions: ranks of a sharded base must run equally many micro-batches."""
    zero = np.zeros(1, np.int64)
    one = Segments(zero + 1, zero + ALONE, device)
    return MicroBatch(zero[:0], _ids(zero, device)[None], _ids(zero, device)[None], None, _ids(zero, device), one)


def _ids(array: Array, device: torch.device | str) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)
