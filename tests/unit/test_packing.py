"""Packing moves tokens about; it may lose none, and changes no meaning."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.datums import DatumBatch
from rlsys.packing import SHORTEST_SHARE, bins, filler, pack, segment

LENGTHS = st.lists(st.integers(0, 40), max_size=30)


def batch_of(lengths: list[int]) -> DatumBatch:
    total = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(total, dtype=np.int32)  # each token is its own place
    return DatumBatch(tokens, tokens + 1000, offsets, {"weights": np.ones(total, np.float32)})


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 60))
def test_every_token_is_in_exactly_one_micro_batch_with_its_target_and_place(lengths: list[int], budget: int) -> None:
    batch = batch_of(lengths)
    micros = pack(batch, budget)
    seen = np.concatenate([micro.index for micro in micros]) if micros else np.zeros(0, np.int64)
    assert sorted(seen.tolist()) == list(range(sum(lengths)))
    for micro in micros:
        assert micro.tokens[0].tolist() == micro.index.tolist()
        assert micro.targets.tolist() == (micro.index + 1000).tolist()
        datum = np.searchsorted(batch.offsets, micro.index, side="right") - 1
        assert micro.positions[0].tolist() == (micro.index - batch.offsets[datum]).tolist()
        ends = micro.segments.offsets.tolist()
        assert [len(set(datum[a:b])) for a, b in itertools.pairwise(ends)] == [1] * (len(ends) - 1)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 60))
def test_only_a_sequence_that_is_alone_exceeds_the_budget(lengths: list[int], budget: int) -> None:
    sizes = np.asarray(lengths, np.int64)
    for members in bins(sizes, budget):
        assert len(members) == 1 or sizes[members].sum() <= budget


def test_first_fit_decreasing_fills_the_gaps() -> None:
    assert [members.tolist() for members in bins(np.array([2, 6, 4, 3, 5]), 10)] == [[1, 2], [4, 3, 0]]


def test_a_batch_without_datums_has_no_micro_batches() -> None:
    assert pack(batch_of([]), 16) == []


def test_a_share_is_packed_by_itself_at_the_places_of_the_whole_batch() -> None:
    batch, share = batch_of([3, 9, 0, 4, 7]), np.array([0, 2, 4])
    (micro,) = pack(batch, 16, share=share)
    assert micro.index.tolist() == micro.tokens[0].tolist() == [12 + 4 + k for k in range(7)] + [0, 1, 2]
    assert pack(batch, 16, share=share[:0]) == []


def test_a_filler_is_one_token_of_no_place() -> None:
    micro = filler()
    assert (micro.tokens.shape, micro.targets.shape, len(micro.index)) == ((1, 1), (1,), 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_a_bucket_has_every_token_once_and_its_padding_behind_it(lengths: list[int]) -> None:
    sizes = np.sort(np.asarray(lengths))[::-1].copy()
    segments = segment(sizes)
    at = 0
    for bucket in segments.buckets:
        mine = sizes[at : at + bucket.rows]
        at += bucket.rows
        assert bucket.tokens == mine.sum()
        assert mine.min() >= SHORTEST_SHARE * bucket.length
        if bucket.gather is None or bucket.scatter is None:
            assert bucket.tokens == bucket.rows * bucket.length
            continue
        assert torch.equal(bucket.gather[bucket.scatter], torch.arange(bucket.tokens))
        cells = torch.zeros(bucket.rows * bucket.length, dtype=torch.bool)
        cells[bucket.scatter] = True
        assert cells.view(bucket.rows, -1).sum(1).tolist() == mine.tolist()
        assert not (cells.view(bucket.rows, -1).int().diff(dim=1) > 0).any()  # no token behind padding
    assert at == len(sizes)


@pytest.mark.parametrize("lengths", [[3, 9, 4], [1, 1, 8, 8]])
def test_segments_in_any_order_are_bucketed_too(lengths: list[int]) -> None:
    assert sum(bucket.tokens for bucket in segment(np.array(lengths)).buckets) == sum(lengths)
