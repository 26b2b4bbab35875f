"""Scaling of losses for a model that computes in float16, whose smallest number is 6e-8 and whose largest is 65,504.

A loss is multiplied by a power of two before the backward pass, and the float32 gradients are divided by it: both are
exact. The power is chosen per micro-batch from its dL/dp, and lowered after an overflow. No state is kept between
steps, so a resumed or replayed step has the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST = 64.0  # |dL/dp| after scaling: a gradient of B sums thousands of tokens, one of A is times a B that is small
LOWER = 16.0  # after an overflow
LEAST = 2.0**-12  # of the first scale; gradients that overflow below it are not finite at any scale


def first_scale(slope_T: Tensor) -> float:
    """First factor for the slopes dL/dp of a micro-batch."""
    largest = float(slope_T.abs().max()) if len(slope_T) else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    return 2.0 ** math.floor(math.log2(LARGEST / largest))


def are_finite(gradients: Iterable[Tensor]) -> bool:
    sizes = [gradient.abs().max() for gradient in gradients]
    return not sizes or bool(torch.stack(sizes).isfinite().all())
