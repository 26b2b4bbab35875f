"""The written-out RMS norm is the norm it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlsys.modeling import rms_norm
from rlsys.modeling.rms_norm import replace_norms

KINDS = pytest.mark.parametrize("kind", [Qwen3RMSNorm, GemmaRMSNorm])


def fresh(dtype: torch.dtype, kind: Any = Qwen3RMSNorm) -> Any:
    norm = kind(6, eps=1e-5)
    norm.weight.data = torch.linspace(-1.0, 2.0, 6)
    return norm.to(dtype)


@KINDS
def test_its_gradients_are_those_of_finite_differences(kind: type[nn.Module]) -> None:
    norm = fresh(torch.float64, kind)
    assert replace_norms(norm) == 1
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: norm(x), (x, norm.weight))


@KINDS
def test_values_and_gradients_are_those_of_transformers(kind: type[nn.Module]) -> None:
    norm, plain = fresh(torch.float32, kind), fresh(torch.float32, kind)
    replace_norms(norm)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for module in (norm, plain):
        module.weight.data += 0.5  # a step of an optimizer is seen
    upstream = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    wanted = torch.autograd.grad(plain(x), (x, plain.weight), upstream)
    torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(found, wanted)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_transformers_s_values_to_the_bit(dtype: torch.dtype, kind: type[nn.Module]) -> None:
    norm, plain = fresh(dtype, kind), fresh(dtype, kind)
    assert replace_norms(norm) == 1
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(norm(x), plain(x))


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_as_near_to_float64_as_those_of_transformers(
    dtype: torch.dtype, kind: type[nn.Module]
) -> None:
    norm, plain, exact = fresh(dtype, kind), fresh(dtype, kind), fresh(torch.float64, kind)
    replace_norms(norm)
    replace_norms(exact)
    exact.weight.data = norm.weight.data.double()
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    upstream = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    slopes = {}
    for name, module in (("ours", norm), ("theirs", plain), ("exact", exact)):
        at = x.to(module.weight.dtype).requires_grad_()
        slopes[name] = torch.autograd.grad(module(at), (at, module.weight), upstream.to(module.weight.dtype))
    for ours, theirs, right in zip(slopes["ours"], slopes["theirs"], slopes["exact"], strict=True):
        assert ours.dtype == theirs.dtype == dtype
        errors = [float((some.double() - right).norm() / right.norm()) for some in (ours, theirs)]
        assert errors[0] <= 1.05 * errors[1], errors


def test_what_is_kept_has_no_copy_of_the_input() -> None:
    norm = fresh(torch.bfloat16)
    replace_norms(norm)
    x = torch.randn(50, 6).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(6,), (50, 1), (50, 6)]
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in kept if tensor.shape == x.shape)


def test_rows_of_several_blocks_and_strides_are_as_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = fresh(torch.float32)
    replace_norms(norm)
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)).transpose(1, 2).requires_grad_()
    upstream = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    whole = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    monkeypatch.setattr(rms_norm, "BLOCK", 7 * 6)
    torch.testing.assert_close(torch.autograd.grad(norm(x), (x, norm.weight), upstream), whole)


@pytest.mark.parametrize("norm", [Cohere2LayerNorm(6), Cohere2LayerNorm(6).bfloat16(), nn.LayerNorm(6)])
def test_another_formula_stays_as_it_is(norm: nn.Module) -> None:
    assert replace_norms(norm) == 0
