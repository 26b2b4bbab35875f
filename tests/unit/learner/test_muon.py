from __future__ import annotations

import pytest
import torch
from torch import nn

from rlsys.learner.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonal

SHAPES = [(5, 5), (4, 9), (9, 4), (1, 6)]


def drawn(shape: tuple[int, int], seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_applies_the_polynomial_to_the_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = drawn(shape)
    u, values, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonal(matrix), u @ values.diag() @ v, rtol=1e-10, atol=1e-12)
    assert torch.all((values > 0.6) & (values < 1.3)), values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orthogonal_of_the_zero_matrix_is_zero(dtype: torch.dtype) -> None:
    assert not orthogonal(torch.zeros(3, 4, dtype=dtype)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torchs_muon_to_the_precision_of_its_bfloat16(shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Parameter(drawn(shape, dtype=torch.float32)) for _ in range(2))
    one = Muon([ours])
    other = torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = ours.detach().clone()
    for step in range(4):
        for weight, optimizer in ((ours, one), (theirs, other)):
            weight.grad = drawn(shape, 10 + step, torch.float32)
            optimizer.param_groups[0].update(lr=0.01 * (step + 1), weight_decay=0.2)
            optimizer.step()
    torch.testing.assert_close(one.state[ours], other.state[theirs])  # the momentum is the same to the bit or nearly
    moved = (ours - before).norm()
    assert (ours - theirs).norm() < 0.02 * moved, ((ours - theirs).norm(), moved)


def test_a_weight_without_a_gradient_stays_and_has_no_state() -> None:
    taught, left = (nn.Parameter(drawn((3, 4))) for _ in range(2))
    optimizer = Muon([taught, left])
    optimizer.param_groups[0].update(lr=0.1, weight_decay=0.5)
    taught.grad, before = drawn((3, 4), 5), left.detach().clone()
    optimizer.step()
    assert torch.equal(left, before) and left not in optimizer.state and not torch.equal(taught, before)
