"""Rewards of a group -> advantages -> datums; a KL penalty is folded in when asked.

Axes: R completions, T completion tokens end to end, as in ``rlsys.rollouts``. Arithmetic is float64, results float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlsys.datums import DatumBatch, shift
from rlsys.errors import ConfigError, DatumError
from rlsys.ledger import AGREED, EMPTY, TRAINED
from rlsys.rollouts import Rollouts
from rlsys.types import Array

if TYPE_CHECKING:
    from rlsys.config import AdvantageSection

STD_EPSILON = 1e-6  # far below any real spread; keeps rewards that differ by rounding from being blown up to +-1


def group_advantages(rewards_R: Array, group: Array, section: AdvantageSection) -> tuple[Array, Array]:
    """((R,) float32 advantages, (R,) bool whether the completion's group agrees).

    Reward minus the baseline: ``mean``, the group's mean (GRPO, arXiv:2402.03300, without its std; Dr. GRPO,
    arXiv:2503.20783), or ``leave_one_out``, the mean of the others (RLOO, arXiv:2402.14740), n/(n-1) times the same.
    ``normalise: std`` divides by the group's standard deviation (GRPO); the paper leaves open which, here it is the
    sample's (n - 1), torch.std's default. A group whose rewards are all equal is exactly 0 under every choice.
    """
    rewards_R = np.asarray(rewards_R, np.float64)
    if not np.isfinite(rewards_R).all():
        r = int(np.flatnonzero(~np.isfinite(rewards_R))[0])
        raise DatumError(f"rewards: found {rewards_R[r]} for completion {r}; wanted finite numbers")
    _, first_G, of_R, count_G = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    if section.baseline == "leave_one_out" and (count_G < 2).any():
        r = int(first_G[count_G < 2][0])
        raise ConfigError(
            f"advantages.baseline 'leave_one_out': found a group of one, completion {r}; wanted at least two per group"
        )
    centred_R = rewards_R - (np.bincount(of_R, rewards_R) / count_G)[of_R]
    advantages_R = centred_R
    if section.baseline == "leave_one_out":
        advantages_R = centred_R * (count_G / (count_G - 1))[of_R]
    if section.normalise == "std":
        std_G = np.sqrt(np.bincount(of_R, centred_R**2) / np.maximum(count_G - 1, 1))
        advantages_R = advantages_R / (std_G + STD_EPSILON)[of_R]
    highest_G, lowest_G = np.full(len(count_G), -np.inf), np.full(len(count_G), np.inf)
    np.maximum.at(highest_G, of_R, rewards_R)
    np.minimum.at(lowest_G, of_R, rewards_R)
    agreeing_R = (highest_G == lowest_G)[of_R]
    return np.where(agreeing_R, 0.0, advantages_R).astype(np.float32), agreeing_R


def fold_kl(
    advantages_T: Array,
    logprobs_T: Array,
    reference_logprobs_T: Array,
    offsets: Array,
    coef: float,
    discount: float = 0.0,
    weights_T: Array | None = None,
) -> tuple[Array, float]:
    """((T,) float32 advantages with the penalty, mean of d = q - log p_ref over the tokens of the batch).

    With adj = coef * w * (mean(d) - d), a token's advantage grows by adj_t + discount * adj_t+1 + discount^2 * adj_t+2
    + ... to the end of its completion; discount 0 leaves adj_t alone. Tinker cookbook, ``incorporate_kl_penalty``.
    ``offsets``: (R + 1,), completion r is [offsets[r]:offsets[r + 1]].
    """
    d_T = np.asarray(logprobs_T, np.float64) - np.asarray(reference_logprobs_T, np.float64)
    w_T = np.ones(len(d_T)) if weights_T is None else np.asarray(weights_T, np.float64)
    d_T = np.where(w_T != 0, d_T, 0.0)
    if not np.isfinite(d_T).all():
        t = int(np.flatnonzero(~np.isfinite(d_T))[0])
        raise DatumError(
            f"reference_logprobs: completion token {t}: found {reference_logprobs_T[t]} with a sampler's "
            f"log-probability of {logprobs_T[t]}; wanted finite values"
        )
    mean = float((w_T * d_T).sum() / w_T.sum()) if w_T.any() else 0.0
    adjustment_T = coef * w_T * (mean - d_T)
    total_T = np.asarray(advantages_T, np.float64) + discounted_future_sum(adjustment_T, offsets, discount)
    return total_T.astype(np.float32), mean


def discounted_future_sum(values_T: Array, offsets: Array, discount: float) -> Array:
    """(T,) sum over k of discount^k * values[t + k], within each completion.

    By doubling: a sum over n tokens is the sum over n/2 from here plus discount^(n/2) times the one that starts n/2
    further on, so that log2(longest) passes over flat arrays do.
    """
    lengths_R = np.diff(offsets)
    total_T = np.array(values_T, np.float64)
    left_T = np.repeat(offsets[1:], lengths_R) - np.arange(len(total_T))  # tokens to the end, this one included
    reach = 1
    while discount > 0 and reach < lengths_R.max(initial=0):
        t = np.flatnonzero(left_T > reach)
        total_T[t] = total_T[t] + discount**reach * total_T[t + reach]
        reach *= 2
    return total_T


def group_outcomes(rollouts: Rollouts, rewards_R: Array, section: AdvantageSection) -> Array:
    """(P,) int8, what became of each group in `to_datums`: TRAINED, AGREED (left out) or EMPTY (without a token)."""
    P = len(rollouts.problems)
    tokens_P = np.bincount(rollouts.group, rollouts.lengths, minlength=P)
    outcomes_P = np.where(tokens_P > 0, TRAINED, EMPTY).astype(np.int8)
    if section.drop_agreeing and section.kl_coef == 0:
        _, agreeing_R = group_advantages(rewards_R, rollouts.group, section)
        outcomes_P[np.unique(rollouts.group[agreeing_R])] = AGREED
    return outcomes_P


def to_datums(
    rollouts: Rollouts, rewards_R: Array, section: AdvantageSection, reference_logprobs_T: Array | None = None
) -> tuple[DatumBatch, dict[str, float]]:
    """The step's training batch and its figures; no datums when every group agrees and agreeing groups are dropped.

    ``reference_logprobs_T``: (T,) log-probabilities of the completion tokens under the reference, with a KL
    coefficient only. A coefficient keeps agreeing groups, since their tokens differ from the reference all the same.
    """
    R, T = len(rollouts.group), len(rollouts.tokens)
    if len(rewards_R) != R or R == 0:
        raise DatumError(f"rewards: found {len(rewards_R)} for {R} completions; wanted one each, of at least one")
    if (section.kl_coef > 0) != (reference_logprobs_T is not None):
        found = "none" if reference_logprobs_T is None else "some"
        wanted = "one per completion token" if section.kl_coef > 0 else "none, they would be computed for nothing"
        raise DatumError(f"reference_logprobs: found {found}, with kl_coef {section.kl_coef:g}; wanted {wanted}")
    rewards_R = np.asarray(rewards_R, np.float64)
    advantages_R, agreeing_R = group_advantages(rewards_R, rollouts.group, section)
    advantages_T = np.repeat(advantages_R, rollouts.lengths)
    metrics = {
        "reward/mean": float(rewards_R.mean()),
        "reward/std": float(rewards_R.std()),
        "reward/groups": float(len(np.unique(rollouts.group))),
        "reward/agreeing_groups": float(len(np.unique(rollouts.group[agreeing_R]))),
    }
    keep_R = None
    if reference_logprobs_T is None:
        keep_R = ~agreeing_R if section.drop_agreeing else None
    else:
        if np.shape(reference_logprobs_T) != (T,):
            raise DatumError(f"reference_logprobs: found shape {np.shape(reference_logprobs_T)}; wanted ({T},)")
        advantages_T, metrics["policy/kl_reference"] = fold_kl(
            advantages_T,
            rollouts.logprobs,
            reference_logprobs_T,
            rollouts.offsets,
            section.kl_coef,
            section.kl_discount,
        )
    batch = shift(rollouts, advantages_T, keep_R)
    metrics["advantages/mean_abs"] = float(np.abs(advantages_T).mean(dtype=np.float64)) if T else 0.0
    metrics["datums/count"] = float(batch.num_datums)
    metrics["datums/tokens"] = float(len(batch.tokens))
    return batch, metrics
