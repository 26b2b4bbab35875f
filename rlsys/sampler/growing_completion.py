"""One completion while it grows: what a model wrote in one stretch, and what a reply put in between.

Stretches end to end are a completion; completions of P prompts are Rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.rollouts import ENVIRONMENT, LENGTH, STOP, Rollouts, offsets_of
from rlsys.types import Array


@dataclass(frozen=True, slots=True)
class Completion:
    """T tokens of one completion; log-probabilities (nats) under the distribution that drew them."""

    tokens: Array  # (T,) int32
    logprobs: Array  # (T,) float32
    versions: Array  # (T,) int32
    stopped: bool  # by a stop token or string; else for want of room

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.logprobs) == len(self.versions)

    def head(self, count: int, stopped: bool) -> Completion:
        """The first `count` tokens."""
        return Completion(self.tokens[:count], self.logprobs[:count], self.versions[:count], stopped)


def completion_of(tokens: Sequence[int], logprobs: Sequence[float], version: int, stopped: bool) -> Completion:
    """What one version wrote."""
    versions = np.full(len(tokens), version, np.int32)
    return Completion(np.asarray(tokens, np.int32), np.asarray(logprobs, np.float32), versions, stopped)


def environment_reply(tokens: Sequence[int]) -> Completion:
    """What an environment wrote."""
    return completion_of(tokens, [0.0] * len(tokens), ENVIRONMENT, stopped=False)


def join_completions(parts: Sequence[Completion]) -> Completion:
    """Parts end to end; it has stopped if the last part has."""
    if len(parts) == 1:
        return parts[0]
    return Completion(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.versions for part in parts]),
        parts[-1].stopped,
    )


def to_rollouts(
    problems: Array, prompt_tokens: Array, prompt_offsets: Array, completions: Sequence[Completion]
) -> Rollouts:
    """R completions of P prompts, equally many of each, a group's adjacent."""
    P, R = len(problems), len(completions)
    assert (R % P if P else R) == 0
    empty = completion_of([], [], 0, stopped=True)
    whole = join_completions([empty, *completions])
    return Rollouts(
        problems=np.asarray(problems, np.int64),
        prompt_tokens=np.asarray(prompt_tokens, np.int32),
        prompt_offsets=np.asarray(prompt_offsets, np.int64),
        group=np.repeat(np.arange(P, dtype=np.int32), R // P if P else 0),
        tokens=whole.tokens,
        logprobs=whole.logprobs,
        versions=whole.versions,
        offsets=offsets_of([len(one.tokens) for one in completions]),
        stop_reasons=np.array([STOP if one.stopped else LENGTH for one in completions], np.int8),
    )
