"""Computes mean grade, share of solved problems and pass@k of a policy, each with a confidence interval.

Axis: P problems. A grade is any finite number. With grades 0 and 1, the mean grade is the share of solved problems.
The problems are treated as a random sample of all problems of their kind: an interval covers the value on that
population. The problem is the sampling unit: completions of one problem are not treated as independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rlsys.types import Array

CONFIDENCE = 0.95  # level of the intervals of an evaluation, as papers give it


@dataclass(frozen=True, slots=True)
class Interval:
    """Value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of one policy on P problems."""

    accuracy: Interval  # mean grade of the greedy completions
    solved: Interval  # share of greedy completions with a grade of rewards.solved_at or more
    pass_at: Mapping[int, Interval]  # k -> pass@k
    problems: int
    samples: int  # sampled completions per problem, for pass@k; 0: none
    confidence: float

    def metrics(self) -> dict[str, float]:
        """Return the results as metrics with the names of docs/metrics.md."""
        intervals = {
            "accuracy": self.accuracy,
            "solved": self.solved,
            **{f"pass_at_{k}": interval for k, interval in self.pass_at.items()},
        }
        metrics = {"eval/problems": float(self.problems), "eval/samples": float(self.samples)}
        for name, interval in intervals.items():
            metrics |= {
                f"eval/{name}": interval.value,
                f"eval/{name}_low": interval.low,
                f"eval/{name}_high": interval.high,
            }
        return metrics


def evaluation_of(
    grade_P: Array,
    passed_P: Array | None,
    samples: int,
    ks: Sequence[int],
    confidence: float,
    solved_at: float = 1.0,
) -> Evaluation:
    """Compute all statistics of an evaluation.

    `grade_P`: finite grade of each greedy completion; a grade of `solved_at` or more is correct. `passed_P`: number of
    correct completions among the `samples` sampled ones of each problem; None if none were sampled. `ks`: the k of
    pass@k. `confidence`: level of the intervals, such as 0.95.
    """
    assert len(grade_P) and np.isfinite(grade_P).all(), "graders give finite numbers"
    pass_at: dict[int, Interval] = {}
    if passed_P is not None:
        assert len(passed_P) == len(grade_P)
        pass_at = {k: over_problems(pass_at_k(passed_P, samples, k), confidence) for k in ks}
    solved = wilson(float(np.mean(np.asarray(grade_P) >= solved_at)), len(grade_P), confidence)
    samples = samples if passed_P is not None else 0
    return Evaluation(mean_grade(grade_P, confidence), solved, pass_at, len(grade_P), samples, confidence)


def mean_grade(grade_P: Array, confidence: float) -> Interval:
    """Return the mean grade with Wilson's interval if every grade is 0 or 1, else with the normal interval."""
    if _is_right_or_wrong(grade_P):
        return wilson(float(np.mean(grade_P, dtype=np.float64)), len(grade_P), confidence)
    return normal(grade_P, confidence)


def normal(values_P: Array, confidence: float) -> Interval:
    """Return the mean of finite values and its normal interval, z standard errors to each side.

    For equal values, or a single value, the interval has zero width: without known bounds of the values, their spread
    on other problems cannot be estimated.
    """
    values_P = np.asarray(values_P, np.float64)
    mean = float(values_P.mean())
    half = _z(confidence) * float(values_P.std(ddof=1)) / math.sqrt(len(values_P)) if len(values_P) > 1 else 0.0
    return Interval(mean, mean - half, mean + half)


def _is_right_or_wrong(grade_P: Array) -> bool:
    return bool(np.isin(grade_P, (0, 1)).all())


def pass_at_k(passed_P: Array, samples: int, k: int) -> Array:
    """Return pass@k of each problem, (P,) float64: 1 - C(n - c, k) / C(n, k), for c correct among n completions.

    The share of all subsets of k completions that contain a correct one: an unbiased estimate of the probability that k
    new completions do. Chen et al. 2021, arXiv:2107.03374. Computed as a product that cannot overflow:
    C(n - c, k) / C(n, k) = prod over i in n - c + 1 .. n of (1 - k / i), which is 0 if n - c < k.
    """
    assert 1 <= k <= samples and passed_P.min() >= 0 and passed_P.max() <= samples
    i = np.arange(samples, 0, -1)
    missed_by_c = np.concatenate([[1.0], np.cumprod(np.maximum(0.0, 1.0 - k / i))])  # (n + 1,), c = 0 .. n
    missed_P: Array = missed_by_c[passed_P]
    return 1.0 - missed_P


def wilson(mean: float, problems: int, confidence: float) -> Interval:
    """Return the score interval of a mean of values in 0..1. Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.

    Derived for values 0 and 1. The interval stays within 0..1, with positive width also at both ends. For values in
    between it is conservative: the variance of values in 0..1 is at most mean (1 - mean).
    """
    assert problems >= 1 and 0 <= mean <= 1
    z2 = _z(confidence) ** 2
    centre = (mean + z2 / (2 * problems)) / (1 + z2 / problems)
    half = math.sqrt(z2 * (mean * (1 - mean) / problems + z2 / (4 * problems**2))) / (1 + z2 / problems)
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def over_problems(values_P: Array, confidence: float) -> Interval:
    """Return the mean of values in 0..1, one per problem, with an interval over problems.

    The interval is the normal interval of the values and z^2 pseudo-observations, half of them 0 and half 1. For values
    0 and 1 it is the interval of Agresti and Coull (1998, Am. Stat. 52, 119-126). The pseudo-observations keep it from
    zero width if all P values are equal, and from being far too narrow if nearly all are, as a bootstrap over problems
    would be: docs/evaluation.md has the figures.
    """
    return _with_more(values_P, np.array([0.0, 1.0]), np.full(2, _z(confidence) ** 2 / 2), confidence)


def difference(before_P: Array, after_P: Array, confidence: float) -> Interval:
    """Return the mean difference (after - before) of two policies' grades on the same problems, in the same order.

    Pairing removes the variance between problems, and so detects smaller differences than two separate intervals.
    Grades of 0 and 1: as `over_problems`, with two pseudo-observations, half a problem each for: solved only before,
    only after, by both, by neither (Agresti and Min 2005, Stat. Med. 24, 729-740). Other grades: the normal interval of
    the differences.
    """
    assert before_P.shape == after_P.shape and before_P.ndim == 1
    change_P = after_P.astype(np.float64) - before_P.astype(np.float64)
    if not (_is_right_or_wrong(before_P) and _is_right_or_wrong(after_P)):
        return normal(change_P, confidence)
    return _with_more(change_P, np.array([-1.0, 0.0, 1.0]), np.array([0.5, 1.0, 0.5]), confidence)


def _with_more(values_P: Array, more: Array, weights: Array, confidence: float) -> Interval:
    """Return the mean of the values, with an interval that also uses weighted pseudo-observations `more`.

    The first and last of `more` are the smallest and largest possible value, and bound the interval.
    """
    values, weights = np.concatenate([values_P, more]), np.concatenate([np.ones(len(values_P)), weights])
    total, mean = float(weights.sum()), float(np.mean(values_P, dtype=np.float64))
    centre = float(weights @ values) / total
    half = _z(confidence) * math.sqrt(float(weights @ (values - centre) ** 2)) / total
    low, high = max(float(more[0]), centre - half), min(float(more[-1]), centre + half)
    return Interval(mean, min(mean, low), max(mean, high))


def _z(confidence: float) -> float:
    """Return the two-sided normal quantile: 1.96 for a confidence of 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
