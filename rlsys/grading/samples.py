"""Completions as a person reads them, with what was made of each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlsys.data.problems import ProblemSet
from rlsys.datums import DatumBatch
from rlsys.rollouts import LENGTH, Rollouts
from rlsys.types import Array


@dataclass(frozen=True, slots=True)
class RolloutSample:
    """One completion. The lists have an entry per token; they are empty where nothing was learned from the step."""

    problem: int
    prompt: str
    completion: str
    answer: str
    reward: float
    advantage: float | None  # reward minus the group's mean, before any normalising; None for a group of one
    tokens: int
    stop_reason: str
    pieces: list[str]
    advantages: list[float]
    ratios: list[float | None]  # p / q; None: not trained on
    sampled: list[bool]


@dataclass(frozen=True, slots=True)
class LearnedBatch:
    """What a step's learner saw: the pieces' datums, whose completions they are, and its log-probabilities p."""

    batches: Sequence[DatumBatch]
    rows: Sequence[Array]  # (D,) of each piece
    logprobs: Sequence[Array]  # one per position of each piece


def best_and_worst(rollouts: Rollouts, rewards_R: Array, count: int) -> Array:
    """Numbers of completions: half of them with the highest rewards, half with the lowest, best first.

    Of equal rewards those that stand out of their group come first, and a group is shown by one completion of each kind
    before it is by two.
    """
    P = len(rollouts.problems)
    means_P = np.bincount(rollouts.group, rewards_R, P) / np.bincount(rollouts.group, minlength=P)
    order = np.lexsort((np.arange(len(rewards_R)), -(rewards_R - means_P[rollouts.group]), -rewards_R))
    count = min(count, len(order))
    best = _one_of_each_group_first(order, rollouts.group)[: (count + 1) // 2]
    rest = order[~np.isin(order, best)][::-1]
    worst = _one_of_each_group_first(rest, rollouts.group)[: count - len(best)]
    return np.concatenate([best, worst[::-1]])


def _one_of_each_group_first(order: Array, group: Array) -> Array:
    first = np.sort(np.unique(group[order], return_index=True)[1])
    return np.concatenate([order[first], np.delete(order, first)])


def first_of_groups(rollouts: Rollouts, count: int) -> Array:
    """Numbers of the first completion of each of the first groups."""
    return np.unique(rollouts.group, return_index=True)[1][:count]


def turn_texts(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts) -> list[str]:
    """(R,) what the model wrote: its turns' texts, one below the other, replies of an environment left out."""
    sampled = rollouts.sampled
    if sampled.all():
        completions = np.split(rollouts.tokens, rollouts.offsets[1:-1])
        texts: list[str] = tokenizer.batch_decode(completions, skip_special_tokens=True)
        return texts
    return ["\n".join(_turns(tokenizer, rollouts, sampled, r)) for r in range(len(rollouts.group))]


def _turns(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts, sampled: Array, r: int) -> list[str]:
    mine = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
    tokens, is_mine = rollouts.tokens[mine], sampled[mine]
    cuts = np.flatnonzero(np.diff(is_mine)) + 1
    turns = [part for part, own in zip(np.split(tokens, cuts), np.split(is_mine, cuts), strict=True) if own.all()]
    decoded: list[str] = tokenizer.batch_decode(turns, skip_special_tokens=True)
    return decoded


def rollout_samples(
    tokenizer: PreTrainedTokenizerBase,
    problems: ProblemSet,
    rollouts: Rollouts,
    rewards_R: Array,
    chosen: Array,
    learned: LearnedBatch | None,
) -> list[RolloutSample]:
    """The completions with the numbers `chosen`, in that order."""
    sizes = np.bincount(rollouts.group)
    means = np.bincount(rollouts.group, rewards_R) / sizes
    texts = tokenizer.batch_decode([rollouts.completion(r) for r in chosen], skip_special_tokens=True)
    shown = []
    for r, text in zip(chosen, texts, strict=True):
        group = rollouts.group[r]
        problem = int(rollouts.problems[group])
        advantages, ratios = _of_tokens(rollouts, int(r), learned) if learned else ([], [])
        ids = rollouts.completion(r).tolist() if learned else []
        mine = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
        shown.append(
            RolloutSample(
                problem=problem,
                prompt=problems.prompts[problem],
                completion=text,
                answer=problems.answers[problem],
                reward=float(rewards_R[r]),
                advantage=float(rewards_R[r] - means[group]) if sizes[group] > 1 else None,
                tokens=int(rollouts.lengths[r]),
                stop_reason="length" if rollouts.stop_reasons[r] == LENGTH else "stop",
                pieces=[tokenizer.decode([token]) for token in ids],
                advantages=advantages,
                ratios=ratios,
                sampled=rollouts.sampled[mine].tolist() if learned else [],
            )
        )
    return shown


def _of_tokens(rollouts: Rollouts, r: int, learned: LearnedBatch) -> tuple[list[float], list[float | None]]:
    """(advantages, ratios) of a completion's tokens; of one that made no datum, zeros and None."""
    length = int(rollouts.lengths[r])
    for batch, rows, logprobs in zip(learned.batches, learned.rows, learned.logprobs, strict=True):
        at = np.flatnonzero(rows == r)
        if len(at):
            end = int(batch.offsets[at[0] + 1])
            mine = slice(end - length, end)  # a datum ends with its completion
            trained = batch.columns["weights"][mine] != 0
            ratios = np.exp(np.float64(logprobs[mine]) - batch.columns["logprobs"][mine])
            advantages = np.where(trained, batch.columns["advantages"][mine], 0.0)
            return advantages.tolist(), [float(x) if w else None for x, w in zip(ratios, trained, strict=True)]
    return [0.0] * length, [None] * length
