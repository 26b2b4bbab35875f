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
from rlsys.packing import segment

LENGTHS = np.array([11, 10, 9, 5, 4, 1])


def closed_form(query: Tensor, key: Tensor, value: Tensor, lengths: np.ndarray) -> Tensor:
    """softmax(q k / sqrt d) v over the earlier tokens of one's own segment; (T, Hq, D) from (T, H, D)."""
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    place = torch.arange(len(owner))
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), value)


def draw(total: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(total, heads, 8, dtype=torch.float64, generator=generator).requires_grad_() for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("lengths", [LENGTHS, np.array([7]), np.array([4, 4, 4]), np.array([1, 9, 3])])
def test_values_and_gradients_are_those_of_the_closed_form(lengths: np.ndarray) -> None:
    inputs = draw(int(lengths.sum()))
    packed, _ = attention.packed_attention(
        nn.Identity(), *(x.transpose(0, 1)[None] for x in inputs), None, rlsys_segments=segment(lengths)
    )
    wanted = closed_form(*inputs, lengths)
    torch.testing.assert_close(packed[0], wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for found, right in zip(
        torch.autograd.grad(packed[0], inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature", ["softcap", "s_aux", "position_bias"])
def test_what_it_does_not_compute_is_refused(feature: str) -> None:
    inputs = [x.transpose(0, 1)[None] for x in draw(3)]
    extra: dict[str, Any] = {feature: 1.0}
    with pytest.raises(ConfigError, match=feature):
        attention.packed_attention(nn.Identity(), *inputs, None, rlsys_segments=segment(np.array([3])), **extra)


def test_a_window_that_would_cut_a_sequence_is_refused_and_a_wider_one_is_not() -> None:
    inputs = [x.transpose(0, 1)[None] for x in draw(3)]
    segments = segment(np.array([3]))
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
