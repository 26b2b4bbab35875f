"""The written-out RMS norm is the norm it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlsys.norms import replace_norms


def fresh(dtype: torch.dtype) -> nn.Module:
    norm = Qwen3RMSNorm(6, eps=1e-5)
    norm.weight.data = torch.linspace(-1.0, 2.0, 6)
    return norm.to(dtype)


def test_its_gradients_are_those_of_finite_differences() -> None:
    norm = fresh(torch.float64)
    assert replace_norms(norm) == 1
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: norm(x), (x, norm.weight))


def test_values_and_gradients_are_those_of_transformers() -> None:
    norm, plain = fresh(torch.float32), fresh(torch.float32)
    replace_norms(norm)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for module in (norm, plain):
        module.weight.data += 0.5  # a step of an optimizer is seen
    upstream = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    wanted = torch.autograd.grad(plain(x), (x, plain.weight), upstream)
    torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("norm", [GemmaRMSNorm(6), fresh(torch.bfloat16), nn.LayerNorm(6)])
def test_another_formula_and_half_precision_stay_as_they_are(norm: nn.Module) -> None:
    assert replace_norms(norm) == 0
