"""Metrics of a step: reduces the metrics of its parts (minibatches, samplers) to one value each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Metrics = Mapping[str, float]  # names are listed in docs/metrics.md

SUMS = frozenset(
    {
        "loss/sum",
        "datums/count",
        "datums/tokens",
        "reward/groups",
        "reward/agreeing_groups",
        "reward/wrong",
        "reward/timeouts",
        "reward/format_timeouts",
        "reward/errors",
        "sampler/completions",
        "sampler/completion_tokens",
        "sampler/resampled_groups",
        "sampler/reply_timeouts",
        "sampler/reply_errors",
        "sampler/out_of_turns",
    }
)
# Weights of means, by metric name or else by section: the count over which the mean was computed.
WEIGHTS = {
    "sampler/version_mean": "policy/tokens",
    "sampler": "sampler/completions",
    "reward": "reward/completions",
    "policy": "policy/tokens",
    "advantages": "datums/tokens",
}


def reduce_metrics(parts: Sequence[Metrics]) -> dict[str, float]:
    """Reduce the metrics of several parts: counts are summed, ``_max`` and ``_min`` take the extreme, of
    ``policy/version`` the last value counts, and all others are weighted means. A metric that only some parts have is
    reduced over these parts.
    """
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part]
        values = [part[name] for part in having]
        if len(values) == 1:
            combined[name] = values[0]
        elif name in SUMS or name in WEIGHTS.values():
            combined[name] = sum(values)
        elif name.endswith("_max"):
            combined[name] = max(values)
        elif name.endswith("_min"):
            combined[name] = min(values)
        elif name == "policy/version":
            combined[name] = values[-1]
        else:
            weights = [part.get(WEIGHTS.get(name) or WEIGHTS.get(name.partition("/")[0], ""), 1.0) for part in having]
            combined[name] = _weighted_mean(values, weights)
            if name == "reward/std":  # of all completions, around their common mean
                means = [part["reward/mean"] for part in having]
                squares = [std**2 + mean**2 for std, mean in zip(values, means, strict=True)]
                combined[name] = math.sqrt(
                    max(0.0, _weighted_mean(squares, weights) - _weighted_mean(means, weights) ** 2)
                )
    return combined


def _weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / total if total else values[-1]
