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
from transformers import AutoModelForCausalLM, Qwen3Config

from rlsys.errors import ConfigError
from rlsys.modeling import attention
from rlsys.modeling import attention_kernels as kernels
from rlsys.modeling import prefix_layout as segments_module
from rlsys.modeling.load_checks import check_packing, logit_transform
from rlsys.modeling.logprobs import AS_THEY_ARE, LogitTransform
from rlsys.modeling.prefix_layout import ALONE, Segments, alone

LENGTHS = np.array([11, 10, 9, 5, 4, 1])


def visible(lengths: np.ndarray, reads: np.ndarray, window: int | None = None) -> Tensor:
    """(T, T), which token (row) sees which: the earlier ones of its own segment and all of the one it reads, as far as
    the window goes back in the sequence."""
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    read = torch.from_numpy(np.repeat(reads, lengths))
    place = torch.arange(len(owner))
    seen = ((owner[:, None] == owner) & (place[:, None] >= place)) | (read[:, None] == owner)
    if window is not None:
        begin = np.where(reads == ALONE, 0, lengths[reads]) - np.concatenate([[0], np.cumsum(lengths)[:-1]])
        position = place + torch.from_numpy(np.repeat(begin, lengths))
        seen &= position[:, None] - position < window
    return seen


Triple = tuple[Tensor, Tensor, Tensor]


def closed_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: np.ndarray,
    reads: np.ndarray,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k / sqrt d) v over what is visible; (T, Hq, D) from (T, H, D). A sink is one more score."""
    seen = visible(lengths, reads, window)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1])
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., : len(key)], value)


def draw(total: int, dtype: torch.dtype = torch.float64) -> Triple:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        return torch.randn(total, heads, 8, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    return drawn(4), drawn(2), drawn(2)


def as_a_model_gives(inputs: Triple) -> Triple:
    """(1, H, T, D) from (T, H, D)."""
    query, key, value = (x.transpose(0, 1)[None] for x in inputs)
    return query, key, value


def packed(inputs: Triple, segments: Segments, **kwargs: Any) -> Tensor:
    out, _ = attention.packed_attention(
        nn.Identity(), *as_a_model_gives(inputs), None, rlsys_segments=segments, **kwargs
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
    query, key, value = (x.detach().bfloat16() for x in draw(int(lengths.sum())))
    wanted = closed_form(query.double(), key.double(), value.double(), lengths, reads)
    found = packed((query, key, value), Segments(lengths, reads)).double()
    assert float((found - wanted).norm()) <= 4 * 2**-9 * float(wanted.norm())


def draw_sinks(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([-1.0, 0.5, 2.0, -30.0], dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("cap", [None, 0.7], ids=["", "cap"])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("pack", PACKS)
def test_windows_caps_and_sinks_have_values_and_gradients_of_the_closed_form(
    pack: str, window: int | None, cap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "TILE", 3)  # several runs in a segment
    monkeypatch.setattr(segments_module, "TILE_KEYS", 12)  # several tiles of like runs
    lengths, reads = PACKS[pack]
    inputs, exact = draw(int(lengths.sum())), draw(int(lengths.sum()))
    aux, exact_aux = (draw_sinks(), draw_sinks()) if sinks else (None, None)
    found = packed(inputs, Segments(lengths, reads), sliding_window=window, softcap=cap, s_aux=aux)
    wanted = closed_form(*exact, lengths, reads, window, cap, exact_aux)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_found = torch.autograd.grad(found, inputs if aux is None else (*inputs, aux), upstream)
    of_wanted = torch.autograd.grad(wanted, exact if exact_aux is None else (*exact, exact_aux), upstream)
    for mine, right in zip(of_found, of_wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=4e-12)


def steep(inputs: Triple) -> Triple:
    query, key, value = inputs
    return (query.detach() * 20).requires_grad_(), key, value


@pytest.mark.parametrize("cap", [None, 5.0], ids=["", "cap"])
def test_long_sequences_of_several_tiles_and_portions_are_the_closed_form_too(
    cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real sizes of tiles, scores of 100 at which a row's padding sees what its token does not."""
    monkeypatch.setattr(kernels, "SCORE_BYTES", 1_000_000)
    lengths, reads = np.array([300, 150, 40, 333, 1, 130, 140]), np.array([ALONE, 0, 0, ALONE, ALONE, 4, 4])
    inputs, exact = steep(draw(int(lengths.sum()), torch.float32)), steep(draw(int(lengths.sum())))
    found = packed(inputs, Segments(lengths, reads), sliding_window=100, softcap=cap)
    wanted = closed_form(*exact, lengths, reads, 100, cap)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    upstream = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_found = torch.autograd.grad(found, inputs, upstream.float())
    for mine, right in zip(of_found, torch.autograd.grad(wanted, exact, upstream), strict=True):
        assert float((mine.double() - right).norm()) < 1e-5 * float(right.norm())


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("window", [1, 3, 6])
def test_a_window_on_kernels_that_know_no_tiles_is_the_closed_form(pack: str, window: int) -> None:
    lengths, reads = PACKS[pack]
    inputs, segments = draw(int(lengths.sum())), Segments(lengths, reads)
    found = kernels.masked(*inputs, segments, None, window)
    torch.testing.assert_close(found, closed_form(*inputs, lengths, reads, window), rtol=1e-12, atol=1e-12)


def test_matrix_products_are_what_the_flash_kernel_gives() -> None:
    """They stand in for it where there is a sink or a cap on a GPU."""
    generator = torch.Generator().manual_seed(0)
    query, grad = (torch.randn(3, 4, 5, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    key, value = (torch.randn(3, 2, 9, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    hidden = torch.ones(5, 9, dtype=torch.bool).triu(5)
    bias = torch.zeros(5, 9, dtype=torch.float64).masked_fill(hidden, -math.inf)
    wanted = kernels._flash(query, key, value, attn_mask=bias, scale=0.3)
    out = kernels._by_products(query, key, value, hidden, 0.3, None)
    torch.testing.assert_close(out, tuple(wanted), rtol=1e-12, atol=1e-12)
    slopes = kernels._flash_backward(grad, query, key, value, *wanted, 0.0, False, attn_mask=bias, scale=0.3)
    found = kernels._by_products_backward(grad, query, key, value, *out, hidden, 0.3, None)
    torch.testing.assert_close(found, tuple(slopes), rtol=1e-12, atol=1e-12)


def test_a_window_that_cuts_no_sequence_changes_no_bit() -> None:
    lengths, reads = PACKS["two families, a sequence between"]
    segments = Segments(lengths, reads)
    found = [packed(draw(segments_total, torch.float32), segments, sliding_window=window)
             for segments_total in [int(lengths.sum())] for window in (None, segments.longest, 1000)]  # fmt: skip
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("window", [None, 1, 2, 4, 7])
@pytest.mark.parametrize("pack", PACKS)
def test_every_layout_of_a_pack_says_the_same(pack: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask, the tiles, and the key lists with the last query at the last key, against what the closed form sees."""
    monkeypatch.setattr(segments_module, "TILE", 3)
    lengths, reads = PACKS[pack]
    segments, wanted = Segments(lengths, reads), visible(lengths, reads, window).numpy()
    assert np.array_equal(segments.mask(window).numpy(), wanted)
    lists, by_lists = segments.key_lists(window), np.zeros_like(wanted)
    keys = np.arange(int(lengths.sum())) if lists.keys is None else lists.keys.numpy()
    for first, last, key, end in zip(
        *(x.tolist() for o in (lists.offsets, lists.key_offsets) for x in (o[:-1], o[1:])), strict=True
    ):
        for query in range(first, last):
            at = end - (last - 1 - query)
            by_lists[query, keys[key if window is None else max(key, at - window) : at]] = True
    assert np.array_equal(by_lists, wanted)
    by_tiles, seen_by = np.zeros_like(wanted), np.zeros(len(wanted), int)
    for tile in segments.tiles(window):
        of_key = tile.keys.view(tile.rows, -1)
        for token, place in zip(tile.tokens.tolist(), tile.places.tolist(), strict=True):
            row, query = divmod(place, tile.length)
            by_tiles[token, of_key[row][~tile.hidden(window)[query]].numpy()] = True
            seen_by[token] += 1
    assert np.array_equal(by_tiles, wanted) and (seen_by == 1).all()
    if window is None:
        assert segments.longest == int(wanted.sum(1).max())


@pytest.mark.parametrize(
    ("argument", "names"), [({"position_bias": 1.0}, "position_bias"), ({"is_causal": False}, "later tokens"),
                            ({"block_indices": 1, "output_attentions": False}, "block_indices")],
)  # fmt: skip
def test_what_it_does_not_compute_is_refused(argument: dict[str, Any], names: str) -> None:
    """Whatever else a model gives to its attention would be lost."""
    inputs = as_a_model_gives(draw(3))
    with pytest.raises(ConfigError, match=f"Identity uses {names} in its attention"):
        attention.packed_attention(nn.Identity(), *inputs, None, rlsys_segments=alone(np.array([3])), **argument)


def test_a_model_that_does_not_hand_the_segments_on_is_refused() -> None:
    inputs = as_a_model_gives(draw(3))
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
    check_packing(model)
    model.model.layers[1].self_attn = Leaky(model.model.layers[1].self_attn)
    with pytest.raises(ConfigError, match="leaks information"):
        check_packing(model)


def deep(dtype: torch.dtype) -> Any:
    """36 random layers whose first token is padding, a row of zeros."""
    attention.register()
    config = Qwen3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=36, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, attn_implementation=attention.NAME,
    )  # fmt: skip
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    assert not model.get_input_embeddings().weight[0].any()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deep_model_with_a_padding_token_of_zeros_is_no_leak(dtype: torch.dtype) -> None:
    check_packing(deep(dtype))


def test_gradients_that_are_not_finite_are_no_leak_but_said_to_be_what_they_are() -> None:
    model = deep(torch.float32)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match=r"not finite in torch.float32; wanted weights without inf"):
        check_packing(model)


def wrapped(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The model with something done to its logits."""
    whole = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = whole(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_or_a_cap_after_the_output_layer_is_read_from_the_model(
    tiny_model: Callable[[bool], Path], dtype: torch.dtype
) -> None:
    """The cap is far above any logit of this model."""
    model = load(tiny_model(True)).to(dtype)
    assert logit_transform(model) == AS_THEY_ARE
    scaled = logit_transform(wrapped(load(tiny_model(True)).to(dtype), lambda logits: logits / 6.0))
    assert scaled.scale == pytest.approx(1 / 6, rel=1e-6) and scaled.cap is None
    capped = logit_transform(wrapped(load(tiny_model(True)).to(dtype), lambda logits: 50 * torch.tanh(logits / 50)))
    assert capped == LogitTransform(cap=50.0)


@pytest.mark.parametrize(
    "change",
    [torch.tanh, lambda logits: logits + 1.0, lambda logits: 0.5 * torch.tanh(logits), torch.sinh, torch.sin],
    ids=["cap of 1", "bias", "cap and scale", "sinh", "sin"],
)
def test_what_else_is_done_to_logits_is_refused(tiny_model: Callable[[bool], Path], change: Any) -> None:
    model = wrapped(load(tiny_model(True)), change)
    if change is torch.tanh:
        assert logit_transform(model) == LogitTransform(cap=1.0)
        return
    with pytest.raises(ConfigError, match="around the output layer"):
        logit_transform(model)


def test_an_output_layer_that_reads_something_else_is_refused(tiny_model: Callable[[bool], Path]) -> None:
    model = load(tiny_model(True))
    model.lm_head.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
    with pytest.raises(ConfigError, match="around the output layer"):
        logit_transform(model)


def test_a_window_that_stands_in_the_configuration_alone_is_refused(tiny_model: Callable[[bool], Path]) -> None:
    model = load(tiny_model(True))
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 7
    model.model.has_sliding_layers = True
    with pytest.raises(ConfigError, match=r"layer 1 passes a window of None to its attention, but config.json says 7"):
        check_packing(model)


def test_layers_that_are_no_attention_are_refused_by_name(tiny_model: Callable[[bool], Path]) -> None:
    model = load(tiny_model(True))
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="layers of type linear_attention"):
        check_packing(model)
