"""Computes advantages from the rewards of each group, and datums from advantages. docs/algorithms.md has the formulas
with their sources.

    A_t = ((reward - baseline of the group) / std of the group, if configured  +  KL term of token t) / aggregate

The aggregate divides the sum of both terms, as 1/|o| in GRPO (arXiv:2402.03300, equation 3) applies to policy and KL
terms. So ``kl_coef`` has the same meaning with every aggregate. Tokens of an environment have no advantage and are not
part of any mean.

Axes: P groups, R completions, T completion tokens end to end, as in ``rlsys.rollouts``. Computed in float64; results
are float32.
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

STD_EPSILON = 1e-6  # far below a real standard deviation; rewards that differ only by rounding do not become +-1


def group_advantages(rewards_R: Array, group: Array, section: AdvantageSection) -> tuple[Array, Array]:
    """Advantages of completions: ((R,) float32 advantages, (R,) bool whether the group has zero variance).

    An advantage is the reward minus a baseline: ``mean``, the group's mean (GRPO, arXiv:2402.03300, without its std;
    Dr. GRPO, arXiv:2503.20783); ``leave_one_out``, the mean of the group's other rewards (RLOO, arXiv:2402.14740),
    which gives n/(n-1) times the advantage of ``mean``; ``none``, 0 (REINFORCE). ``normalise: std`` divides by the
    group's standard deviation (GRPO). The paper does not define it further; here it is the sample's (n - 1), the
    default of torch.std. In a group with equal rewards all advantages are exactly 0, except with ``none``, where they
    are the rewards.

    Raises:
        DatumError: a reward is not finite.
        ConfigError: ``leave_one_out`` with a group of one completion.
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
    """(P,) bool, whether all rewards of a group are equal. `group`: (R,) group of each reward; `groups`: P."""
    highest_P, lowest_P = np.full(groups, -np.inf), np.full(groups, np.inf)
    np.maximum.at(highest_P, group, rewards_R)
    np.minimum.at(lowest_P, group, rewards_R)
    return highest_P == lowest_P


def groups_without_gradient(rewards_R: Array, group: Array, groups: int, section: AdvantageSection) -> Array:
    """(P,) bool, whether all advantages of a group are 0: with a baseline if all rewards are equal, without a baseline
    if all rewards are 0. ``drop_agreeing`` removes such groups, and dynamic sampling replaces them."""
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
    """Add a KL penalty to advantages: ((T,) float32 advantages, mean of d = q - log p_ref over the weighted tokens).

    With adj_t = coef * w_t * (mean(d) - d_t), a token's advantage grows by adj_t + discount * adj_t+1 + discount^2 *
    adj_t+2 + ... until the end of its completion; discount 0: by adj_t. Source: Tinker cookbook,
    ``incorporate_kl_penalty``. ``offsets``: (R + 1,), completion r is [offsets[r]:offsets[r + 1]]; ``weights_T``: w,
    default 1. Log-probabilities are nats.

    Raises:
        DatumError: d is not finite at a token with a weight.
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
    """(T,) float64, sum over k of discount^k * values[t + k] within each completion.

    Computed by doubling, in log2(longest completion) passes over flat arrays: the sum over n tokens from t is the sum
    over n/2 tokens from t plus discount^(n/2) times the sum over n/2 tokens from t + n/2.
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
    """Compute the advantages of a step's groups, and split the groups in sampling order into minibatches of datums.

    Returns (minibatches; per minibatch (D,) completion of each datum; metrics of all; (P,) int8 outcome of each group:
    TRAINED, AGREED (dropped) or EMPTY (no token to train on)). A minibatch can have no datums.

    ``reference_logprobs_T``: (T,) log-probabilities (nats) of the completion tokens under the reference model; required
    with a KL coefficient and refused without one. With a KL coefficient groups of zero variance are kept, because the
    KL term gives their tokens a gradient; the mean of the KL term is computed per minibatch.

    Raises:
        DatumError: rewards or reference log-probabilities do not match the rollouts, or are not finite.
        ConfigError: as `group_advantages`.
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
    """Apply ``fold_kl`` to each minibatch in place; returns the mean of d over all trained tokens."""
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
        wanted = "one per completion token" if section.kl_coef > 0 else "none, because nothing uses them"
        raise DatumError(f"reference_logprobs: found {found}, with kl_coef {section.kl_coef:g}; wanted {wanted}")
    if reference_logprobs_T is not None and np.shape(reference_logprobs_T) != (T,):
        raise DatumError(f"reference_logprobs: found shape {np.shape(reference_logprobs_T)}; wanted ({T},)")


def _row_ranges(rollouts: Rollouts, num_minibatches: int) -> list[tuple[int, int]]:
    """(first, end) completion of each minibatch: a group's completions are adjacent, groups are in sampling order."""
    shares = np.array_split(np.arange(len(rollouts.problems)), num_minibatches)
    ends = np.searchsorted(rollouts.group, np.cumsum([len(share) for share in shares]))
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _divisors(rollouts: Rollouts, rl: RlSection) -> Array:
    """(R,) divisor of each completion's advantages (``aggregate``)."""
    if rl.advantages.aggregate == "length":
        return np.maximum(rollouts.sampled_lengths, 1)
    return np.full(len(rollouts.group), rl.sampling.max_tokens if rl.advantages.aggregate == "max_tokens" else 1)
