"""Packed attention is attention of each sequence by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlsys import attention
from rlsys.errors import ConfigError
from rlsys.segments import ALONE, Segments, alone

LENGTHS = np.array([11, 10, 9, 5, 4, 1])


def closed_form(query: Tensor, key: Tensor, value: Tensor, lengths: np.ndarray, reads: np.ndarray) -> Tensor:
    """softmax(q k / sqrt d) v over the earlier tokens of one's own segment and all of the one it reads; (T, Hq, D) from
    (T, H, D)."""
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    read = torch.from_numpy(np.repeat(reads, lengths))
    place = torch.arange(len(owner))
    seen = ((owner[:, None] == owner) & (place[:, None] >= place)) | (read[:, None] == owner)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), value)


def draw(total: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(total, heads, 8, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


def packed(inputs: list[Tensor], segments: Segments) -> Tensor:
    out, _ = attention.packed_attention(
        nn.Identity(), *(x.transpose(0, 1)[None] for x in inputs), None, rlsys_segments=segments
    )
    return out[0]


PACKS = {
    "sequences of several lengths": (LENGTHS, np.full(6, ALONE)),
    "one sequence": (np.array([7]), np.array([ALONE])),
    "one rectangle without padding": (np.array([4, 4, 4]), np.full(3, ALONE)),
    "lengths in no order": (np.array([1, 9, 3]), np.full(3, ALONE)),
    "a prompt that three read": (np.array([5, 3, 1, 4]), np.array([ALONE, 0, 0, 0])),
    "two families, a sequence between": (np.array([2, 6, 6, 3, 9, 1, 1]), np.array([ALONE, 0, 0, ALONE, ALONE, 4, 4])),
}  # fmt: skip


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients_are_those_of_the_closed_form(pack: str, dtype: torch.dtype, bound: float) -> None:
    lengths, reads = PACKS[pack]
    inputs, exact = draw(int(lengths.sum()), dtype), draw(int(lengths.sum()))
    found, wanted = packed(inputs, Segments(lengths, reads)), closed_form(*exact, lengths, reads)
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)
    upstream = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_found = torch.autograd.grad(found, inputs, upstream.to(dtype))
    for mine, right in zip(of_found, torch.autograd.grad(wanted, exact, upstream), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=bound, atol=4 * bound)


@pytest.mark.parametrize("pack", PACKS)
def test_in_half_precision_it_is_as_near_to_the_closed_form_as_rounding_the_inputs(pack: str) -> None:
    """One bfloat16 rounding is 2^-9; output and merging round once more each, so four of them bound the error."""
    lengths, reads = PACKS[pack]
    exact = [x.detach().bfloat16().double() for x in draw(int(lengths.sum()))]
    wanted = closed_form(*exact, lengths, reads)
    found = packed([x.bfloat16() for x in exact], Segments(lengths, reads)).double()
    assert float((found - wanted).norm()) <= 4 * 2**-9 * float(wanted.norm())


@pytest.mark.parametrize("pack", PACKS)
def test_every_layout_of_a_pack_says_the_same(pack: str) -> None:
    """The mask, and the key lists with the last query at the last key, against what the closed form sees."""
    lengths, reads = PACKS[pack]
    segments = Segments(lengths, reads)
    owner, place = np.repeat(np.arange(len(lengths)), lengths), np.arange(int(lengths.sum()))
    wanted = ((owner[:, None] == owner) & (place[:, None] >= place)) | (np.repeat(reads, lengths)[:, None] == owner)
    assert np.array_equal(segments.mask().numpy(), wanted)
    lists, by_lists = segments.key_lists, np.zeros_like(wanted)
    keys = place if lists.keys is None else lists.keys.numpy()
    for first, last, key, end in zip(
        *(x.tolist() for o in (lists.offsets, lists.key_offsets) for x in (o[:-1], o[1:])), strict=True
    ):
        for query in range(first, last):
            by_lists[query, keys[key : end - (last - 1 - query)]] = True
    assert np.array_equal(by_lists, wanted)
    assert segments.longest == int(wanted.sum(1).max())


@pytest.mark.parametrize("feature", ["softcap", "s_aux", "position_bias"])
def test_what_it_does_not_compute_is_refused(feature: str) -> None:
    inputs = [x.transpose(0, 1)[None] for x in draw(3)]
    extra: dict[str, Any] = {feature: 1.0}
    with pytest.raises(ConfigError, match=feature):
        attention.packed_attention(nn.Identity(), *inputs, None, rlsys_segments=alone(np.array([3])), **extra)


def test_a_window_that_would_cut_a_sequence_is_refused_and_a_wider_one_is_not() -> None:
    inputs = [x.transpose(0, 1)[None] for x in draw(3)]
    segments = alone(np.array([3]))
    with pytest.raises(ConfigError, match="sliding window of 2"):
        attention.packed_attention(nn.Identity(), *inputs, None, rlsys_segments=segments, sliding_window=2)
    attention.packed_attention(nn.Identity(), *inputs, None, rlsys_segments=segments, sliding_window=3)


def test_a_model_that_does_not_hand_the_segments_on_is_refused() -> None:
    inputs = [x.transpose(0, 1)[None] for x in draw(3)]
    with pytest.raises(ConfigError, match="does not pass rlsys_segments on"):
        attention.packed_attention(nn.Identity(), *inputs, None)


class Leaky(nn.Module):
    """An attention layer behind which every token mixes with the one before it, as a convolution does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, weights = self.inner(*args, **kwargs)
        return hidden + 1e-6 * hidden.roll(1, dims=1), weights


def load(path: Path) -> Any:
    attention.register()
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention.NAME).eval()


def test_a_model_that_leaks_between_sequences_is_refused(tiny_model: Callable[[bool], Path]) -> None:
    model = load(tiny_model(True))
    attention.prove_packing(model)
    model.model.layers[1].self_attn = Leaky(model.model.layers[1].self_attn)
    with pytest.raises(ConfigError, match="another sequence"):
        attention.prove_packing(model)


def test_a_model_that_changes_its_logits_after_the_output_layer_is_refused(tiny_model: Callable[[bool], Path]) -> None:
    model = load(tiny_model(True))
    whole = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = whole(*args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    model.forward = capped
    with pytest.raises(ConfigError, match="after the output layer"):
        attention.prove_packing(model)
