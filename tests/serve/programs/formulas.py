"""The losses of Tinker's documentation in NumPy: p of the learner, q of the sampler, advantages A; sums."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cross_entropy(p: Array, weights: Array) -> float:
    return float(-(weights * p).sum())


def importance_sampling(p: Array, q: Array, a: Array) -> float:
    return float(-(np.exp(p - q) * a).sum())


def ppo(p: Array, q: Array, a: Array, low: float = 0.8, high: float = 1.2) -> float:
    ratio = np.exp(p - q)
    return float(-np.minimum(ratio * a, np.clip(ratio, low, high) * a).sum())


def cispo(p: Array, q: Array, a: Array, low: float = 0.8, high: float = 1.2) -> float:
    return float(-(np.clip(np.exp(p - q), low, high) * p * a).sum())


def dro(p: Array, q: Array, a: Array, beta: float = 0.05) -> float:
    return float(-(p * a - 0.5 * beta * (p - q) ** 2).sum())


def gspo(p: Array, q: Array, a: Array, mask: Array, low: float, high: float) -> float:
    """Of one sequence: the ratio of the sequence is the geometric mean of those of its sampled tokens."""
    ratio = np.exp((mask * (p - q)).sum() / mask.sum())
    return float(-np.minimum(ratio * a, np.clip(ratio, low, high) * a).sum())


def of(loss: str, p: Array, datum: Mapping[str, Array], config: Mapping[str, float]) -> float:
    """Value of a built-in loss on one datum with the names that forward_backward takes."""
    if loss == "cross_entropy":
        return cross_entropy(p, datum.get("weights", np.ones_like(p)))
    q, a = datum["logprobs"], datum["advantages"]
    if loss == "importance_sampling":
        return importance_sampling(p, q, a)
    if loss == "dro":
        return dro(p, q, a, config.get("beta", 0.05))
    bounds = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    if loss == "gspo":
        return gspo(p, q, a, datum["sequence_ratio_mask"], *bounds)
    return {"ppo": ppo, "cispo": cispo}[loss](p, q, a, *bounds)
