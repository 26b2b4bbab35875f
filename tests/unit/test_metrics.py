"""Figures of a step's parts and of the whole say the same."""

from __future__ import annotations

import numpy as np
import pytest

from rlsys.metrics import reduce_metrics


def test_mean_and_spread_of_parts_are_those_of_all_completions() -> None:
    parts = [np.array([0.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0, 0.5])]
    whole = np.concatenate(parts)
    facts = reduce_metrics(
        [
            {"reward/mean": part.mean(), "reward/std": part.std(), "reward/completions": float(len(part))}
            for part in parts
        ]
    )
    assert facts["reward/mean"] == pytest.approx(whole.mean())
    assert facts["reward/std"] == pytest.approx(whole.std())
    assert facts["reward/completions"] == len(whole)


def test_counts_add_up_and_means_over_tokens_weigh_by_tokens() -> None:
    facts = reduce_metrics(
        [
            {"reward/format_timeouts": 1.0, "sampler/version_mean": 2.0, "policy/tokens": 30.0},
            {"reward/format_timeouts": 2.0, "sampler/version_mean": 4.0, "policy/tokens": 10.0},
            {"reward/format_timeouts": 0.0, "policy/tokens": 0.0},
        ]
    )
    assert facts == {"reward/format_timeouts": 3.0, "sampler/version_mean": 2.5, "policy/tokens": 40.0}


def test_extremes_of_parts_are_the_extremes_of_all() -> None:
    parts = [{"policy/ratio_max": 1.5, "reward/any_min": 0.2}, {"policy/ratio_max": 3.0, "reward/any_min": 0.1}]
    assert reduce_metrics(parts) == {"policy/ratio_max": 3.0, "reward/any_min": 0.1}
