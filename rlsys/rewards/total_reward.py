"""Computes the reward of a completion from the task's grade and further terms; docs/algorithms.md lists their sources.

    reward = correct * grade + format * form + length * brevity - overlong penalty

Axes as in ``rlsys.rollouts``: P groups, R completions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex

from rlsys.config import OverlongSection, RewardSection
from rlsys.errors import GradingError
from rlsys.math_grading.extraction import extract
from rlsys.rollouts import Rollouts
from rlsys.types import Array

# A pattern with catastrophic backtracking may run practically forever on model output. `regex` supports a timeout, the
# standard library's `re` does not. A text whose match times out counts as not matching. The two limits bound the total
# time of a batch to 20 s, so that the watchdog does not stop the run.
FORMAT_TIMEOUT_S = 0.1
MAX_FORMAT_TIMEOUTS = 200
_MESSAGE_CHARS = 200  # characters of a completion in an error message


def total_rewards(
    grades_R: Array,
    rollouts: Rollouts,
    texts: Sequence[str],
    config: RewardSection,
    overlong: OverlongSection,
    max_tokens: int,
) -> tuple[Array, dict[str, float]]:
    """Compute the (R,) float32 rewards, and the mean of each weighted term; the means add up to the mean reward.

    ``grades_R``: the task's finite grades. ``texts``: the text that the model wrote, R strings.

    Raises:
        GradingError: rewards.format_pattern timed out on too many texts, or a reward exceeds the range of float32.
    """
    assert len(grades_R) == len(texts) == len(rollouts.group)
    grades_R = np.asarray(grades_R, np.float64)
    terms, metrics = {"correct": config.correct * grades_R}, dict[str, float]()
    if config.format != 0:
        form_R, timeouts = forms(texts, config)
        terms["format"] = config.format * form_R
        metrics["reward/format_timeouts"] = float(timeouts)
    if config.length != 0:
        terms["length"] = config.length * brevity(
            rollouts.sampled_lengths, grades_R >= config.solved_at, rollouts.group
        )
    if overlong.handling == "penalty":
        terms["overlong"] = -overlong.penalty * overlong_share(rollouts.lengths, max_tokens, overlong.buffer_tokens)
    rewards_R = np.sum(list(terms.values()), axis=0)
    beyond_R = ~(np.abs(rewards_R) <= np.finfo(np.float32).max)
    if beyond_R.any():
        r = int(np.argmax(beyond_R))
        raise GradingError(
            f"rewards: problem {rollouts.problems[rollouts.group[r]]}: found a reward of {rewards_R[r]:g}, from a "
            f"grade of {grades_R[r]:g} times rewards.correct {config.correct:g} and the other terms; wanted a value in "
            "the range of float32, 3.4e38 at most"
        )
    if len(rewards_R):
        metrics |= {f"reward/{name}": float(values_R.mean()) for name, values_R in terms.items()}
        metrics |= {"reward/mean": float(rewards_R.mean()), "reward/std": float(rewards_R.std())}
    return rewards_R.astype(np.float32), metrics


def forms(texts: Sequence[str], config: RewardSection) -> tuple[Array, int]:
    """Return (R,) scores, 1.0 for a text in the required format, else 0.0, and the number of timeouts (scored 0.0).

    Without rewards.format_pattern, a text with a final answer (a box or a #### line) has the required format.

    Raises:
        GradingError: the pattern timed out on too many texts.
    """
    if config.format_pattern is None:
        return np.array([extract(text) is not None for text in texts], np.float64), 0
    pattern = regex.compile(config.format_pattern)
    form_R, timeouts = np.zeros(len(texts)), 0
    for r, text in enumerate(texts):
        try:
            form_R[r] = pattern.search(text, timeout=FORMAT_TIMEOUT_S) is not None
        except TimeoutError:
            timeouts += 1
            if timeouts > min(config.max_failed_share * len(texts), MAX_FORMAT_TIMEOUTS):
                raise GradingError(
                    f"rewards.format_pattern {config.format_pattern!r}: {timeouts} of {r + 1} completions tried took "
                    f"longer than {FORMAT_TIMEOUT_S:g} s each, above the limit of rewards.max_failed_share = "
                    f"{config.max_failed_share:g} of {len(texts)} or {MAX_FORMAT_TIMEOUTS}. Last one: "
                    f"{text[:_MESSAGE_CHARS]!r}. Rewrite the pattern without nested repetitions, such as (a+)+"
                ) from None
    return form_R, timeouts


def brevity(lengths_R: Array, correct_R: Array, group: Array) -> Array:
    """Compute the (R,) length reward of Kimi k1.5 (arXiv:2501.12599, section 2.3.3).

    It falls linearly from 1/2 for the shortest completion of a group to -1/2 for the longest. Incorrect completions get
    at most 0. If all lengths of a group are equal, it is 0.
    """
    P = int(group.max(initial=-1)) + 1
    longest_P, shortest_P = np.zeros(P), np.full(P, np.inf)
    np.maximum.at(longest_P, group, lengths_R)
    np.minimum.at(shortest_P, group, lengths_R)
    span_R = (longest_P - shortest_P)[group]
    lambda_R = 0.5 - (lengths_R - shortest_P[group]) / np.maximum(span_R, 1)
    length_reward_R = np.where(correct_R, lambda_R, np.minimum(0.0, lambda_R))
    return np.where(span_R > 0, length_reward_R, 0.0)


def overlong_share(lengths_R: Array, max_tokens: int, buffer_tokens: int) -> Array:
    """Compute the (R,) overlong penalty, in 0..1: DAPO, arXiv:2503.14476, equation 13, with the opposite sign.

    0 up to max_tokens - buffer_tokens, 1 at max_tokens, linear in between.
    """
    share: Array = np.clip((np.asarray(lengths_R) - (max_tokens - buffer_tokens)) / buffer_tokens, 0.0, 1.0)
    return share
