"""Columnar rollouts: produced by samplers, consumed by graders and the advantage actor.

Flat arrays and offsets, so that Ray transfers a batch without copies or per-token objects. Axes: P groups (one prompt
each), R completions (those of a group are adjacent), T completion tokens end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.types import Array

STOP, LENGTH = 0, 1  # values of Rollouts.stop_reasons
ENVIRONMENT = -2  # value of Rollouts.versions: token of an environment's reply; its log-probability is 0


@dataclass(frozen=True, slots=True)
class Rollouts:
    """R completions of P prompts, with log-probabilities (nats) under the distribution they were sampled from."""

    problems: Array  # (P,) int64, id in the problem set
    prompt_tokens: Array  # int32, the P prompts end to end
    prompt_offsets: Array  # (P + 1,) int64
    group: Array  # (R,) int32, row of `problems`; ascending
    tokens: Array  # (T,) int32, the R completions end to end
    logprobs: Array  # (T,) float32
    versions: Array  # (T,) int32, adapter version that sampled each token, or ENVIRONMENT
    offsets: Array  # (R + 1,) int64, completion r is [offsets[r]:offsets[r + 1]]
    stop_reasons: Array  # (R,) int8, STOP or LENGTH

    def __post_init__(self) -> None:
        P, R, T = len(self.problems), len(self.group), len(self.tokens)
        assert len(self.prompt_offsets) == P + 1 and len(self.offsets) == R + 1
        assert self.prompt_offsets[-1] == len(self.prompt_tokens) and self.offsets[-1] == T
        assert len(self.logprobs) == len(self.versions) == T and len(self.stop_reasons) == R

    @property
    def lengths(self) -> Array:
        """(R,) completion lengths in tokens, replies of an environment included."""
        return np.diff(self.offsets)

    @property
    def sampled(self) -> Array:
        """(T,) bool, tokens sampled by the model; only these are trained on."""
        return self.versions != ENVIRONMENT

    @property
    def sampled_lengths(self) -> Array:
        """(R,) number of sampled tokens of each completion."""
        written = np.concatenate([[0], np.cumsum(self.sampled)])
        return np.diff(written[self.offsets])

    def counts(self) -> dict[str, float]:
        """Counts of completions, sampled tokens and truncated completions; they can be summed over samplers."""
        return {
            "completions": float(len(self.group)),
            "tokens": float(np.count_nonzero(self.sampled)),
            "truncated": float(np.count_nonzero(self.stop_reasons == LENGTH)),
        }

    def completion(self, r: int) -> Array:
        """Tokens of completion r, as a view."""
        return self.tokens[self.offsets[r] : self.offsets[r + 1]]

    def prompt(self, p: int) -> Array:
        """Tokens of prompt p, as a view."""
        return self.prompt_tokens[self.prompt_offsets[p] : self.prompt_offsets[p + 1]]


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """Join the rollouts of several samplers. Each part holds complete groups."""
    if len(parts) == 1:
        return parts[0]
    first_group = np.cumsum([0] + [len(part.problems) for part in parts[:-1]])
    return Rollouts(
        problems=np.concatenate([part.problems for part in parts]),
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts]),
        prompt_offsets=join_offsets([part.prompt_offsets for part in parts]),
        group=np.concatenate([part.group + start for part, start in zip(parts, first_group, strict=True)]).astype(
            np.int32
        ),
        tokens=np.concatenate([part.tokens for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        versions=np.concatenate([part.versions for part in parts]),
        offsets=join_offsets([part.offsets for part in parts]),
        stop_reasons=np.concatenate([part.stop_reasons for part in parts]),
    )


def offsets_of(lengths: Array | Sequence[int]) -> Array:
    """(n,) lengths -> (n + 1,) int64 offsets."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def join_offsets(parts: Sequence[Array]) -> Array:
    """Offsets of several columns joined end to end."""
    return offsets_of(np.concatenate([np.diff(part) for part in parts]))


def spans(starts: Array, lengths: Array) -> Array:
    """Indices of ranges, end to end: starts 5 0, lengths 2 3 -> 5 6 0 1 2."""
    offsets = offsets_of(lengths)
    indices: Array = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return indices
