"""Rewards of a group -> advantages -> datums; docs/algorithms.md has the formulas with their sources.

    A_t = (reward minus the group's baseline, over its std if asked  +  KL term of token t) / aggregate

The aggregate divides last and divides all, as 1/|o| in GRPO (arXiv:2402.03300, equation 3) stands before policy and KL
terms alike; so ``kl_coef`` means the same under every aggregate. Tokens of an environment have no advantage and are in
no mean.

Axes: P groups, R completions, T completion tokens end to end, as in ``rlsys.rollouts``. Arithmetic is float64, results
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlsys.datums import DatumBatch, learned_rows, shift
from rlsys.errors import ConfigError, DatumError
from rlsys.rollouts import LENGTH, Rollouts
from rlsys.run_state.ledger import AGREED, EMPTY, TRAINED
from rlsys.types import Array

if TYPE_CHECKING:
    from rlsys.config import AdvantageSection, RlSection

STD_EPSILON = 1e-6  # far below any real spread; keeps rewards that differ by rounding from being blown up to +-1


def group_advantages(rewards_R: Array, group: Array, section: AdvantageSection) -> tuple[Array, Array]:
    """((R,) float32 advantages, (R,) bool whether the completion's group agrees).

    Reward minus the baseline: ``mean``, the group's mean (GRPO, arXiv:2402.03300, without its std; Dr. GRPO,
    arXiv:2503.20783), ``leave_one_out``, the mean of the others (RLOO, arXiv:2402.14740), n/(n-1) times the same, or
    ``none``, 0 (REINFORCE). ``normalise: std`` divides by the group's standard deviation (GRPO); the paper leaves open
    which, here it is the sample's (n - 1), torch.std's default. A group whose rewards are all equal is exactly 0 under
    a baseline; under ``none`` its advantages are its rewards.
    """
    rewards_R = np.asarray(rewards_R, np.float64)
    if not np.isfinite(rewards_R).all():
        r = int(np.flatnonzero(~np.isfinite(rewards_R))[0])
        raise DatumError(f"rewards: found {rewards_R[r]} for completion {r}; wanted finite numbers")
    _, first_G, of_R, count_G = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    if section.baseline == "leave_one_out" and (count_G < 2).any():
        r = int(first_G[count_G < 2][0])
        raise ConfigError(
            f"rl.advantages.baseline 'leave_one_out': found a group of one, completion {r}; wanted at least two per "
            "group"
        )
    agreeing_R = zero_variance_groups(rewards_R, of_R, len(count_G))[of_R]
    if section.baseline == "none":
        return rewards_R.astype(np.float32), agreeing_R
    centred_R = rewards_R - (np.bincount(of_R, rewards_R) / count_G)[of_R]
    advantages_R = centred_R
    if section.baseline == "leave_one_out":
        advantages_R = centred_R * (count_G / (count_G - 1))[of_R]
    if section.normalise == "std":
        std_G = np.sqrt(np.bincount(of_R, centred_R**2) / np.maximum(count_G - 1, 1))
        advantages_R = advantages_R / (std_G + STD_EPSILON)[of_R]
    return np.where(agreeing_R, 0.0, advantages_R).astype(np.float32), agreeing_R


def zero_variance_groups(rewards_R: Array, group: Array, groups: int) -> Array:
    """(P,) bool, whether all rewards of a group are the same; `group`: (R,) numbers below `groups`."""
    highest_P, lowest_P = np.full(groups, -np.inf), np.full(groups, np.inf)
    np.maximum.at(highest_P, group, rewards_R)
    np.minimum.at(lowest_P, group, rewards_R)
    return highest_P == lowest_P


def groups_without_gradient(rewards_R: Array, group: Array, groups: int, section: AdvantageSection) -> Array:
    """(P,) bool, whether every advantage of a group is 0: with a baseline that of all rewards the same, without one
    that of all rewards 0. ``drop_agreeing`` leaves these out, and dynamic sampling replaces them."""
    agreeing_P = zero_variance_groups(rewards_R, group, groups)
    if section.baseline != "none":
        return agreeing_P
    return agreeing_P & (np.bincount(group, np.asarray(rewards_R) != 0, minlength=groups) == 0)


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
            f"reference_logprobs: completion token {t} of the batch: found {reference_logprobs_T[t]} with a sampler's "
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


def to_minibatches(
    rollouts: Rollouts, rewards_R: Array, rl: RlSection, num_minibatches: int, reference_logprobs_T: Array | None = None
) -> tuple[tuple[DatumBatch, ...], tuple[Array, ...], dict[str, float], Array]:
    """A step's groups, split in draw order into so many batches that are learned from one after the other.

    Returns the batches; for each (D,) which completion a datum is; the figures of all; and (P,) int8 what became of
    each group: TRAINED, AGREED (left out) or EMPTY (without a token to learn from). A batch may be without datums.

    ``reference_logprobs_T``: (T,) log-probabilities of the completion tokens under the reference, with a KL
    coefficient only. A coefficient keeps groups without an advantage of their own, since their tokens differ from the
    reference all the same; its mean is each batch's own.
    """
    section, lengths_R = rl.advantages, rollouts.lengths
    _refuse_unpaired(rollouts, rewards_R, section, reference_logprobs_T)
    rewards_R = np.asarray(rewards_R, np.float64)
    advantages_R, agreeing_R = group_advantages(rewards_R, rollouts.group, section)
    idle_P = groups_without_gradient(rewards_R, rollouts.group, len(rollouts.problems), section)
    dropped_R = idle_P[rollouts.group] & (section.drop_agreeing and section.kl_coef == 0)
    kept_R = ~dropped_R
    if rl.overlong.handling == "mask":
        kept_R = kept_R & (rollouts.stop_reasons != LENGTH)
    trained_T = rollouts.sampled & np.repeat(kept_R, lengths_R)
    metrics = {
        "reward/mean": float(rewards_R.mean()),
        "reward/std": float(rewards_R.std()),
        "reward/completions": float(len(rewards_R)),
        "reward/groups": float(len(np.unique(rollouts.group))),
        "reward/agreeing_groups": float(len(np.unique(rollouts.group[agreeing_R]))),
    }
    row_ranges = _row_ranges(rollouts, num_minibatches)
    advantages_T = np.repeat(advantages_R, lengths_R)
    if reference_logprobs_T is not None:
        kl = _fold_kl_by_minibatch(advantages_T, rollouts, reference_logprobs_T, section, trained_T, row_ranges)
        metrics["policy/kl_reference"] = kl
    advantages_T = (advantages_T / np.repeat(_divisors(rollouts, rl), lengths_R)).astype(np.float32)
    row = np.arange(len(rewards_R))
    kept = [kept_R & (first <= row) & (row < end) for first, end in row_ranges]
    batches = tuple(shift(rollouts, advantages_T, keep_R) for keep_R in kept)
    rows = tuple(learned_rows(rollouts, keep_R) for keep_R in kept)
    if trained_T.any():
        metrics["sampler/version_mean"] = float(rollouts.versions[trained_T].mean())
        metrics["sampler/version_min"] = float(rollouts.versions[trained_T].min())
    if rollouts.sampled.any():
        metrics["advantages/mean_abs"] = float(np.abs(advantages_T[rollouts.sampled]).mean(dtype=np.float64))
    metrics["policy/tokens"] = float(np.count_nonzero(trained_T))
    metrics["datums/count"] = float(sum(batch.num_datums for batch in batches))
    metrics["datums/tokens"] = float(sum(len(batch.tokens) for batch in batches))
    outcomes_P = np.full(len(rollouts.problems), EMPTY, np.int8)
    outcomes_P[rollouts.group[np.concatenate(rows)]] = TRAINED
    outcomes_P[rollouts.group[dropped_R]] = AGREED
    return batches, rows, metrics, outcomes_P


def _fold_kl_by_minibatch(
    advantages_T: Array,
    rollouts: Rollouts,
    reference_logprobs_T: Array,
    section: AdvantageSection,
    trained_T: Array,
    row_ranges: Sequence[tuple[int, int]],
) -> float:
    """``fold_kl`` into the advantages, in place, each piece with its own mean; the mean over all trained tokens."""
    means, tokens = [], []
    for first, end in row_ranges:
        of = slice(rollouts.offsets[first], rollouts.offsets[end])
        advantages_T[of], mean = fold_kl(
            advantages_T[of],
            rollouts.logprobs[of],
            reference_logprobs_T[of],
            rollouts.offsets[first : end + 1] - rollouts.offsets[first],
            section.kl_coef,
            section.kl_discount,
            trained_T[of],
        )
        means.append(mean)
        tokens.append(np.count_nonzero(trained_T[of]))
    return float(np.dot(means, tokens) / max(1, sum(tokens)))


def _refuse_unpaired(
    rollouts: Rollouts, rewards_R: Array, section: AdvantageSection, reference_logprobs_T: Array | None
) -> None:
    R, T = len(rollouts.group), len(rollouts.tokens)
    if len(rewards_R) != R or R == 0:
        raise DatumError(f"rewards: found {len(rewards_R)} for {R} completions; wanted one each, of at least one")
    if (section.kl_coef > 0) != (reference_logprobs_T is not None):
        found = "none" if reference_logprobs_T is None else "some"
        wanted = "one per completion token" if section.kl_coef > 0 else "none, they would be computed for nothing"
        raise DatumError(f"reference_logprobs: found {found}, with kl_coef {section.kl_coef:g}; wanted {wanted}")
    if reference_logprobs_T is not None and np.shape(reference_logprobs_T) != (T,):
        raise DatumError(f"reference_logprobs: found shape {np.shape(reference_logprobs_T)}; wanted ({T},)")


def _row_ranges(rollouts: Rollouts, num_minibatches: int) -> list[tuple[int, int]]:
    """First completion and end of each piece: a group's completions are adjacent, and groups are in draw order."""
    shares = np.array_split(np.arange(len(rollouts.problems)), num_minibatches)
    ends = np.searchsorted(rollouts.group, np.cumsum([len(share) for share in shares]))
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _divisors(rollouts: Rollouts, rl: RlSection) -> Array:
    """(R,) what a completion's advantages are divided by."""
    if rl.advantages.aggregate == "length":
        return np.maximum(rollouts.sampled_lengths, 1)
    return np.full(len(rollouts.group), rl.sampling.max_tokens if rl.advantages.aggregate == "max_tokens" else 1)
