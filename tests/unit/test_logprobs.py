"""Chunked log-probabilities are those of one whole log-softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlsys.logprobs import token_logprobs

T, H, V = 23, 12, 37


class Adapted(nn.Module):
    """A frozen output layer with a low-rank adapter on it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(3, H, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(V, 3, dtype=base.weight.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.base(hidden) + hidden @ self.a.T @ self.b.T
        return out


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    linear = nn.Linear(H, V, bias=kind == "frozen with bias").to(dtype)
    return Adapted(linear) if kind == "adapted" else linear.requires_grad_(kind == "trained")


@pytest.mark.parametrize("kind", ["frozen", "frozen with bias", "trained", "adapted"])
@pytest.mark.parametrize("chunk", [1, 7, T, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_do_not_depend_on_the_chunk(
    kind: str, chunk: int, temperature: float, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    head = make(kind, dtype)
    hidden = torch.randn(T, H, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (T,))
    upstream = torch.randn(T, dtype=dtype)
    wanted_from = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    whole = torch.log_softmax(head(hidden) / temperature, -1)[torch.arange(T), targets]
    found = token_logprobs(head, hidden, targets, temperature, chunk)
    assert (found - whole).norm() <= bound * whole.norm()
    for got, right in zip(
        torch.autograd.grad(found, wanted_from, upstream),
        torch.autograd.grad(whole, wanted_from, upstream),
        strict=True,
    ):
        assert (got - right).norm() <= bound * right.norm()


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(kind: str) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                    self.rows = max(self.rows, tensor.shape[0])
            return out

    head = make(kind, torch.float32)
    hidden = torch.randn(100, H, requires_grad=True)
    with Largest() as largest:
        token_logprobs(head, hidden, torch.randint(V, (100,)), 1.0, 15).sum().backward()
    assert largest.rows == 15


def test_a_certain_token_keeps_its_small_gradient() -> None:
    """Near p = 1 the slope 1 - p is far below one; as a difference of products it would be lost first."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False).requires_grad_(False)
    hidden = (10.0 * head.weight[:1] / head.weight[0].norm() ** 2).requires_grad_()
    targets = torch.zeros(1, dtype=torch.int64)
    (found,) = torch.autograd.grad(token_logprobs(head, hidden, targets, 1.0, 8), hidden)
    exact = hidden.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(torch.log_softmax(exact @ head.weight.double().T, -1)[:, 0], exact)
    assert right.norm() > 0
    assert (found.double() - right).norm() <= 1e-3 * right.norm()


def test_half_precision_logits_are_normalised_in_fp32() -> None:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False).bfloat16().requires_grad_(False)
    hidden, targets = torch.randn(T, H).bfloat16(), torch.randint(V, (T,))
    found = token_logprobs(head, hidden, targets, 1.0, 8)
    assert found.dtype == torch.float32
    right = torch.log_softmax(head(hidden).float(), -1)[torch.arange(T), targets]
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)
