"""What grades of held-out problems say about a policy: mean grade, share solved and pass@k, each with a confidence
interval.

Axis: P problems. A grade is any finite number; where all are 0 or 1, the mean grade is the share solved. Problems are
taken as drawn from all problems of their kind, so an interval says how far the figure might be off on others of that
kind; completions of one problem stay together in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rlsys.types import Array


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one policy reached on P problems."""

    accuracy: Interval  # mean grade of the greedy completions
    solved: Interval  # share of them whose grade is rewards.solved_at or more
    pass_at: Mapping[int, Interval]  # k -> pass@k
    problems: int
    samples: int  # completions of each problem that pass@k is from; 0: none
    confidence: float

    def metrics(self) -> dict[str, float]:
        """By the names of docs/metrics.md."""
        named = {
            "accuracy": self.accuracy,
            "solved": self.solved,
            **{f"pass_at_{k}": found for k, found in self.pass_at.items()},
        }
        metrics = {"eval/problems": float(self.problems), "eval/samples": float(self.samples)}
        for name, found in named.items():
            metrics |= {f"eval/{name}": found.value, f"eval/{name}_low": found.low, f"eval/{name}_high": found.high}
        return metrics


def evaluation_of(
    grade_P: Array,
    passed_P: Array | None,
    samples: int,
    ks: Sequence[int],
    confidence: float,
    solved_at: float = 1.0,
) -> Evaluation:
    """`grade_P`: of each greedy completion, any finite number; from `solved_at` on it is right. `passed_P`: how many of
    each problem's `samples` sampled completions are right; None where none were sampled."""
    assert len(grade_P) and np.isfinite(grade_P).all(), "graders give finite numbers"
    pass_at: dict[int, Interval] = {}
    if passed_P is not None:
        assert len(passed_P) == len(grade_P)
        pass_at = {k: over_problems(pass_at_k(passed_P, samples, k), confidence) for k in ks}
    solved = wilson(float(np.mean(np.asarray(grade_P) >= solved_at)), len(grade_P), confidence)
    drawn = samples if passed_P is not None else 0
    return Evaluation(mean_grade(grade_P, confidence), solved, pass_at, len(grade_P), drawn, confidence)


def mean_grade(grade_P: Array, confidence: float) -> Interval:
    """Wilson's interval where every grade is 0 or 1, else the normal one."""
    if _is_right_or_wrong(grade_P):
        return wilson(float(np.mean(grade_P, dtype=np.float64)), len(grade_P), confidence)
    return normal(grade_P, confidence)


def normal(values_P: Array, confidence: float) -> Interval:
    """The mean of any finite values and z standard errors to both sides. Values that are all the same show no spread,
    and a single one has none, so there the interval has no width: nothing bounds what other problems may give."""
    values_P = np.asarray(values_P, np.float64)
    mean = float(values_P.mean())
    half = _z(confidence) * float(values_P.std(ddof=1)) / math.sqrt(len(values_P)) if len(values_P) > 1 else 0.0
    return Interval(mean, mean - half, mean + half)


def _is_right_or_wrong(grade_P: Array) -> bool:
    return bool(np.isin(grade_P, (0, 1)).all())


def pass_at_k(passed_P: Array, samples: int, k: int) -> Array:
    """(P,) float64, 1 - C(n - c, k) / C(n, k): the share of all choices of k among n completions, c of them right, that
    hold a right one. An unbiased estimate of the chance that k fresh ones do. Chen et al. 2021, arXiv:2107.03374.

    As a product that no count can overflow: C(n - c, k) / C(n, k) = prod over i in n - c + 1 .. n of (1 - k / i), which
    is 0 where n - c < k.
    """
    assert 1 <= k <= samples and passed_P.min() >= 0 and passed_P.max() <= samples
    i = np.arange(samples, 0, -1)
    missed_by_c = np.concatenate([[1.0], np.cumprod(np.maximum(0.0, 1.0 - k / i))])  # (n + 1,), c = 0 .. n
    missed_P: Array = missed_by_c[passed_P]
    return 1.0 - missed_P


def wilson(mean: float, problems: int, confidence: float) -> Interval:
    """The score interval of a mean of values in 0..1. Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.

    It is made for values 0 and 1, and stays between 0 and 1 and of positive width at both ends. For values in between
    it is wider than need be, never narrower: no values in 0..1 vary more than mean (1 - mean).
    """
    assert problems >= 1 and 0 <= mean <= 1
    z2 = _z(confidence) ** 2
    centre = (mean + z2 / (2 * problems)) / (1 + z2 / problems)
    half = math.sqrt(z2 * (mean * (1 - mean) / problems + z2 / (4 * problems**2))) / (1 + z2 / problems)
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def over_problems(values_P: Array, confidence: float) -> Interval:
    """The mean of values in 0..1, one of each problem, with everything that is known of a problem in its value.

    The normal interval of the values and of z^2 more, half of them 0 and half 1: for values 0 and 1 that is Agresti and
    Coull's (1998, Am. Stat. 52, 119-126). Their problems keep it from being certain where all of P agree, and from
    being far too narrow where nearly all do, as resampling problems is: docs/evaluation.md has the figures.
    """
    return _with_more(values_P, np.array([0.0, 1.0]), np.full(2, _z(confidence) ** 2 / 2), confidence)


def difference(before_P: Array, after_P: Array, confidence: float) -> Interval:
    """How much more the second policy reached than the first on the same problems, in the same order. Pairing leaves
    out what makes a problem hard for both, so it sees smaller differences than two intervals side by side.

    Grades of 0 and 1: as `over_problems`, with two more: half a problem each that only one of the two, both, or neither
    solve. Agresti and Min 2005, Stat. Med. 24, 729-740. Other grades: the normal interval of the differences.
    """
    assert before_P.shape == after_P.shape and before_P.ndim == 1
    change_P = after_P.astype(np.float64) - before_P.astype(np.float64)
    if not (_is_right_or_wrong(before_P) and _is_right_or_wrong(after_P)):
        return normal(change_P, confidence)
    return _with_more(change_P, np.array([-1.0, 0.0, 1.0]), np.array([0.5, 1.0, 0.5]), confidence)


def _with_more(values_P: Array, more: Array, weights: Array, confidence: float) -> Interval:
    """The mean of the values; its ends from them and from further ones, which lie at the ends of what can be."""
    values, weights = np.concatenate([values_P, more]), np.concatenate([np.ones(len(values_P)), weights])
    total, mean = float(weights.sum()), float(np.mean(values_P, dtype=np.float64))
    centre = float(weights @ values) / total
    half = _z(confidence) * math.sqrt(float(weights @ (values - centre) ** 2)) / total
    low, high = max(float(more[0]), centre - half), min(float(more[-1]), centre + half)
    return Interval(mean, min(mean, low), max(mean, high))


def _z(confidence: float) -> float:
    """1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
