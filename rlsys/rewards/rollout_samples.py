"""Selects completions for display, and converts them to text with the advantage and ratio of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlsys.data.problems import ProblemSet
from rlsys.datums import DatumBatch
from rlsys.rollouts import LENGTH, Rollouts
from rlsys.types import Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RolloutSample:
    """Completion for display. The lists have one entry per token; they are empty if the step was not trained on."""

    problem: int
    prompt: str
    completion: str
    answer: str
    reward: float
    advantage: float | None  # reward minus the group's mean, before normalization; None for a group of one completion
    tokens: int  # number of tokens
    stop_reason: str  # "length" or "stop"
    pieces: list[str]  # text of each token
    advantages: list[float]
    ratios: list[float | None]  # p / q, learner to sampler; None for a token without weight in the loss
    sampled: list[bool]  # False for tokens of an environment's reply


@dataclass(frozen=True, slots=True)
class LearnedBatch:
    """Datums of a step's minibatches, and the learner's log-probabilities (nats) of their targets."""

    batches: Sequence[DatumBatch]  # one per minibatch
    rows: Sequence[Array]  # of each minibatch: (D,) index of each datum's completion
    logprobs: Sequence[Array]  # of each minibatch: one per position


def best_and_worst(rollouts: Rollouts, rewards_R: Array, count: int) -> Array:
    """Return indices of `count` completions: half with the highest rewards, half with the lowest, best first.

    Among equal rewards, completions that differ more from their group's mean come first. In each half, a group appears
    a second time only after every other group appeared once.
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
    """Move the first completion of each group to the front, in the given order."""
    first = np.sort(np.unique(group[order], return_index=True)[1])
    return np.concatenate([order[first], np.delete(order, first)])


def first_of_groups(rollouts: Rollouts, count: int) -> Array:
    """Return the index of the first completion of each of the first `count` groups."""
    return np.unique(rollouts.group, return_index=True)[1][:count]


def turn_texts(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts) -> list[str]:
    """Return R texts that the model wrote, without replies of an environment; turns are separated by newlines."""
    sampled = rollouts.sampled
    if sampled.all():
        completions = np.split(rollouts.tokens, rollouts.offsets[1:-1])
        texts: list[str] = tokenizer.batch_decode(completions, skip_special_tokens=True)
        return texts
    return ["\n".join(_turns(tokenizer, rollouts, sampled, r)) for r in range(len(rollouts.group))]


def _turns(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts, sampled: Array, r: int) -> list[str]:
    completion = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
    tokens, is_sampled = rollouts.tokens[completion], sampled[completion]
    cuts = np.flatnonzero(np.diff(is_sampled)) + 1
    parts = zip(np.split(tokens, cuts), np.split(is_sampled, cuts), strict=True)
    turns = [part for part, part_is_sampled in parts if part_is_sampled.all()]
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
    """Convert the completions with the indices `chosen`, in that order."""
    sizes = np.bincount(rollouts.group)
    means = np.bincount(rollouts.group, rewards_R) / sizes
    texts = tokenizer.batch_decode([rollouts.completion(r) for r in chosen], skip_special_tokens=True)
    samples = []
    for r, text in zip(chosen, texts, strict=True):
        group = rollouts.group[r]
        problem = int(rollouts.problems[group])
        advantages, ratios = _token_values(rollouts, int(r), learned) if learned else ([], [])
        ids = rollouts.completion(r).tolist() if learned else []
        completion = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
        samples.append(
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
                sampled=rollouts.sampled[completion].tolist() if learned else [],
            )
        )
    return samples


def _token_values(rollouts: Rollouts, r: int, learned: LearnedBatch) -> tuple[list[float], list[float | None]]:
    """Return (advantages, ratios) of a completion's tokens; zeros and None if the completion has no datum."""
    length = int(rollouts.lengths[r])
    for batch, rows, logprobs in zip(learned.batches, learned.rows, learned.logprobs, strict=True):
        datums = np.flatnonzero(rows == r)
        if len(datums):
            end = int(batch.offsets[datums[0] + 1])
            targets = slice(end - length, end)  # a datum ends with its completion
            trained = batch.columns["weights"][targets] != 0
            ratios = np.exp(np.float64(logprobs[targets]) - batch.columns["logprobs"][targets])
            advantages = np.where(trained, batch.columns["advantages"][targets], 0.0)
            return advantages.tolist(), [float(x) if w else None for x, w in zip(ratios, trained, strict=True)]
    return [0.0] * length, [None] * length
