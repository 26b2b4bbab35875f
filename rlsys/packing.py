"""A batch as packed micro-batches: sequences end to end, no padding, at most ``token_budget`` tokens at once.

Losses are sums over tokens, so how sequences are packed changes neither values nor gradients; only speed and memory.
Sequences of a micro-batch lie in descending length, so that attention can take neighbours of similar length together:

    segments aaaa bbb cc    ->  tokens   a a a a b b b c c          one row, T = 9
                                buckets  [a a a a]  [c c]           right-padded rows, causal: what pads a row comes
                                         [b b b b]                  last, and no real token looks ahead
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlsys.datums import DatumBatch
from rlsys.types import Array

SHORTEST_SHARE = 0.75  # of a bucket's longest; measured on CPU: fewer, larger calls against work on padding


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring segments of similar length as an (n, L) rectangle; the buckets cover the micro-batch in order."""

    tokens: int
    rows: int  # n
    length: int  # L
    gather: Tensor | None  # (n * L,) int64, which of the bucket's tokens is in each cell; None where no cell is padding
    scatter: Tensor | None  # (tokens,) int64, cell of each token


@dataclass(frozen=True, slots=True)
class Segments:
    """S sequences end to end: what attention has to know about a micro-batch."""

    offsets: Tensor  # (S + 1,) int32, segment s is [offsets[s]:offsets[s + 1]]
    longest: int  # tokens
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """T tokens of a batch, as a model with packed attention reads them."""

    index: Array  # (T,) int64, the batch's position of each token; empty for a filler, whose one token is of no batch
    tokens: Tensor  # (1, T) int64
    positions: Tensor  # (1, T) int64, from 0 within each segment
    targets: Tensor  # (T,) int64
    segments: Segments


def pack(
    batch: DatumBatch, token_budget: int, device: torch.device | str = "cpu", share: Array | None = None
) -> list[MicroBatch]:
    """The batch, or the datums numbered in `share`, in as few micro-batches as first-fit decreasing finds; a sequence
    over the budget is one by itself."""
    if share is None:
        return [_micro_batch(batch, datums, device) for datums in bins(batch.lengths, token_budget)]
    return [_micro_batch(batch, share[members], device) for members in bins(batch.lengths[share], token_budget)]


def filler(device: torch.device | str = "cpu") -> MicroBatch:
    """One token that counts nothing: ranks that share a base run as many micro-batches as the busiest of them."""
    zero = np.zeros(1, np.int64)
    return MicroBatch(
        zero[:0], _ids(zero, device)[None], _ids(zero, device)[None], _ids(zero, device), segment(zero + 1, device)
    )


def bins(lengths_D: Array, token_budget: int) -> list[Array]:
    """Datum numbers per bin, longest first (first-fit decreasing). Datums of no tokens are in none."""
    members: list[list[int]] = []
    room: list[int] = []
    for datum in np.argsort(-lengths_D, kind="stable"):
        length = int(lengths_D[datum])
        if length == 0:
            break
        fit = next((at for at, free in enumerate(room) if free >= length), None)
        if fit is None:
            fit = len(room)
            members.append([])
            room.append(token_budget)
        members[fit].append(int(datum))
        room[fit] -= length
    return [np.asarray(datums, np.int64) for datums in members]


def _micro_batch(batch: DatumBatch, datums: Array, device: torch.device | str) -> MicroBatch:
    lengths = batch.lengths[datums]
    positions = _ramps(lengths)
    index = np.repeat(batch.offsets[datums], lengths) + positions
    return MicroBatch(
        index,
        _ids(batch.tokens[index], device)[None],
        _ids(positions, device)[None],
        _ids(batch.targets[index], device),
        segment(lengths, device),
    )


def segment(lengths_S: Array, device: torch.device | str = "cpu") -> Segments:
    """What attention needs for segments of these lengths; buckets are tight where the lengths descend."""
    offsets = np.concatenate([[0], np.cumsum(lengths_S)])
    buckets, first = [], 0
    while first < len(lengths_S):
        part = lengths_S[first:]
        similar = (part >= SHORTEST_SHARE * part[0]) & (part <= part[0])
        last = first + (len(part) if similar.all() else int(similar.argmin()))
        buckets.append(_bucket(lengths_S[first:last], device))
        first = last
    return Segments(torch.from_numpy(offsets.astype(np.int32)).to(device), int(lengths_S.max()), tuple(buckets))


def _bucket(lengths_n: Array, device: torch.device | str) -> Bucket:
    longest, total, rows = int(lengths_n[0]), int(lengths_n.sum()), len(lengths_n)
    if total == rows * longest:
        return Bucket(total, rows, longest, None, None)
    firsts = np.cumsum(lengths_n) - lengths_n
    column = np.arange(longest)
    gather = firsts[:, None] + np.minimum(column, lengths_n[:, None] - 1)  # padding repeats the row's last token
    scatter = np.flatnonzero(column < lengths_n[:, None])
    return Bucket(total, rows, longest, _ids(gather.reshape(-1), device), _ids(scatter, device))


def _ramps(lengths: Array) -> Array:
    """0, 1, ..., length - 1 for each length, end to end."""
    ramps: Array = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return ramps


def _ids(array: Array, device: torch.device | str) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)
