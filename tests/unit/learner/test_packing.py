"""Packing moves tokens about; it may lose none, and changes no meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.datums import DatumBatch
from rlsys.learner.packing import MicroBatch, bins, filler, micro_batch, prefix_groups
from rlsys.modeling.prefix_layout import ALONE, SHORTEST_SHARE, Segments, alone
from tests.examples import examples

LENGTHS = st.lists(st.integers(0, 40), max_size=30)


def batch_of(sequences: list[list[int]]) -> DatumBatch:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in sequences])]).astype(np.int64)
    tokens = np.array([token for row in sequences for token in row], np.int32)
    targets = np.arange(len(tokens), dtype=np.int32) + 1000  # each target is its own place
    return DatumBatch(tokens, targets, offsets, {"weights": np.ones(len(tokens), np.float32)})


def apart(lengths: list[int]) -> DatumBatch:
    """Sequences that begin differently."""
    return batch_of([[1000 * number + at for at in range(length)] for number, length in enumerate(lengths)])


@st.composite
def groups(draw: st.DrawFn) -> DatumBatch:
    """Prompts of a few tokens, each with some ragged completions that may begin alike; some share a header."""
    sequences = []
    for number in range(draw(st.integers(1, 4))):
        prompt = [7] * draw(st.integers(0, 9)) + [100 + number] * draw(st.integers(1, 30))
        for _ in range(draw(st.integers(1, 5))):
            ending = [3] * draw(st.sampled_from([0, 0, 0, 20, 60]))
            sequences.append(prompt + draw(st.lists(st.integers(0, 2), min_size=1, max_size=12)) + ending)
    return batch_of(sequences)


def pack(batch: DatumBatch, budget: int, wanted: np.ndarray | None = None, share: bool = True) -> list[MicroBatch]:
    parts = prefix_groups(batch, wanted, budget, share=share)
    costs = np.array([part.cost for part in parts], np.int64)
    return [micro_batch(batch, [parts[i] for i in members], wanted) for members in bins(costs, budget)]


def contexts(micro: MicroBatch) -> list[list[int]]:
    """For each prediction the tokens that it is made from, by the pack's own mask and positions."""
    seen, tokens = micro.segments.mask(None).numpy(), micro.tokens[0].numpy()
    rows = np.arange(len(tokens)) if micro.rows is None else micro.rows.numpy()
    positions = micro.positions[0].numpy()
    found = []
    for row in rows:
        at = np.flatnonzero(seen[row])
        assert positions[at].tolist() == list(range(len(at)))  # all before it, in order
        found.append(tokens[at].tolist())
    return found


@examples(25)
@given(st.one_of(groups(), LENGTHS.map(apart)), st.integers(1, 80), st.booleans(), st.randoms(use_true_random=False))
def test_every_wanted_position_is_predicted_once_from_exactly_what_stands_before_it(
    batch: DatumBatch, budget: int, share: bool, random: Any
) -> None:
    wanted = np.array([random.random() < 0.6 for _ in batch.tokens], bool)
    for which in (None, wanted):
        micros = pack(batch, budget, which, share)
        seen = np.concatenate([micro.index for micro in micros]) if micros else np.zeros(0, np.int64)
        assert sorted(seen.tolist()) == (
            list(range(len(batch.tokens))) if which is None else np.flatnonzero(wanted).tolist()
        )
        for micro in micros:
            assert micro.targets.tolist() == (micro.index + 1000).tolist()
            for place, context in zip(micro.index, contexts(micro), strict=True):
                start = batch.offsets[np.searchsorted(batch.offsets, place, side="right") - 1]
                assert context == batch.tokens[start : place + 1].tolist()


@settings(deadline=None, max_examples=60)
@given(groups(), st.integers(1, 200))
def test_a_family_costs_what_it_packs_and_exceeds_the_budget_only_as_one_sequence(
    batch: DatumBatch, budget: int
) -> None:
    parts = prefix_groups(batch, None, budget, share=True)
    assert np.concatenate([part.datums for part in parts]).tolist() == list(range(len(batch.offsets) - 1))
    for part in parts:
        assert len(part.datums) > 0
        assert part.cost == micro_batch(batch, [part]).tokens.shape[1]
        assert part.cost <= budget or len(part.datums) == 1


def test_a_group_runs_over_its_prompt_once() -> None:
    prompt = list(range(50))
    (micro,) = pack(batch_of([[*prompt, 90], [*prompt, 91, 92], [*prompt, 91, 93, 94]]), 1000)
    assert micro.tokens.shape == (1, 50 + 1 + 2 + 3)
    assert micro.segments.reads.tolist() == [ALONE, 0, 0, 0]
    (apart,) = pack(batch_of([[*prompt, 90], [*prompt, 91, 92]]), 1000, share=False)
    assert apart.tokens.shape == (1, 51 + 52)


def test_groups_that_have_only_a_header_in_common_stay_apart() -> None:
    header, one, other = [9] * 20, [1] * 30, [2] * 30
    batch = batch_of([header + one + [3 + i] for i in range(4)] + [header + other + [3 + i] for i in range(4)])
    parts = prefix_groups(batch, None, 1000, share=True)
    assert [(part.datums.tolist(), part.shared) for part in parts] == [([0, 1, 2, 3], 50), ([4, 5, 6, 7], 50)]


def test_two_completions_that_begin_alike_do_not_hold_off_the_third() -> None:
    prompt = [5] * 30
    batch = batch_of([[*prompt, 1, 2, 3, 4], [*prompt, 1, 2, 3, 5], [*prompt, 8, 8]])
    (part,) = prefix_groups(batch, None, 1000, share=True)
    assert (part.datums.tolist(), part.shared, part.cost) == ([0, 1, 2], 30, 30 + 4 + 4 + 2)


def test_a_family_over_the_budget_is_cut_into_even_parts_that_each_have_the_prompt() -> None:
    batch = batch_of([[5] * 40 + [number] * 20 for number in range(6)])
    parts = prefix_groups(batch, None, 110, share=True)
    assert [(len(part.datums), part.shared, part.cost) for part in parts] == [(3, 40, 100)] * 2


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 0, 2, 3, 4]])
def test_a_completion_above_an_even_part_is_a_part_of_its_own_wherever_it_stands(order: list[int]) -> None:
    lengths = [60, 10, 10, 10, 10]  # beyond the prompt of 40; 80 fit, so the parts are more than two even ones
    batch = batch_of([[5] * 40 + [number] * lengths[number] for number in order])
    parts = prefix_groups(batch, None, 120, share=True)
    assert sorted(np.concatenate([part.datums for part in parts]).tolist()) == [0, 1, 2, 3, 4]
    assert all(part.cost <= 120 and len(part.datums) > 0 for part in parts)
    assert sum(len(micro.index) for micro in pack(batch, 120)) == len(batch.tokens)


def test_sequences_in_which_nothing_is_wanted_are_not_run() -> None:
    batch = apart([4, 5, 6])
    wanted = np.zeros(15, bool)
    wanted[5] = True
    (micro,) = pack(batch, 100, wanted)
    assert micro.tokens.shape == (1, 5) and micro.index.tolist() == [5]
    assert micro.rows is not None and micro.rows.tolist() == [1]
    assert pack(batch, 100, np.zeros(15, bool)) == []


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
    assert pack(apart([0, 0]), 16) == []


def test_a_filler_is_one_token_of_no_place() -> None:
    micro = filler()
    assert (micro.tokens.shape, micro.targets.shape, len(micro.index)) == ((1, 1), (1,), 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_rectangles_hold_every_token_once_and_its_padding_behind_it(lengths: list[int]) -> None:
    segments = alone(np.array(lengths))
    tokens = torch.cat([shape.tokens for shape in segments.rectangles])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    for shape in segments.rectangles:
        assert torch.equal(shape.cells[shape.places], shape.tokens)
        real = torch.zeros(shape.rows * shape.length, dtype=torch.bool)
        real[shape.places] = True
        assert not (real.view(shape.rows, -1).int().diff(dim=1) > 0).any()  # no token behind padding
        assert int(real.view(shape.rows, -1).sum(1).min()) >= SHORTEST_SHARE * shape.length
        if shape.span:
            assert real.all() and shape.cells.tolist() == list(range(*shape.span))


def test_readers_that_stand_apart_are_refused() -> None:
    with pytest.raises(AssertionError):
        _ = Segments(np.array([3, 1, 2, 1]), np.array([ALONE, 0, ALONE, 0])).readings
