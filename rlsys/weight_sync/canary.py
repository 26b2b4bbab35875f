"""Canaries: fixed token sequences whose log-probabilities show whether learner and sampler compute the same model.

    short   64 tokens, scored at every weight sync: separates one version of an adapter from the next
    long    up to 1,536 tokens, scored once at the start under the base model: shows differences that grow with the
            position (rotary embeddings, sliding windows, scaled positions), which the first 64 tokens do not

The allowed difference between learner and sampler is derived from the model, not from a constant. Two attention kernels
differ by 1e-3 nats on a bfloat16 model of three layers and by 4e-2 on a model of thirty, because later layers amplify
each rounding. The learner scores its canary with two kernels, packed attention and transformers' eager attention; the
sampler scores a sequence alone and within a batch. `bound` allows a multiple of the larger difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlsys.data.problems import ProblemSet
from rlsys.types import Array
from rlsys.weight_sync.update import AdapterSnapshot, WeightUpdate

SHORT_TOKENS = 64  # enough for a stable mean, cheap compared with a step
LONG_TOKENS = 1536
DEPTHS = (64, 256, 512, 1024, LONG_TOKENS)  # the long canary is compared in the last positions before each
POSITIONS_PER_DEPTH = 16

BOUND_FACTOR = 4.0  # of the noise; clean runs measured up to 1.6 (docs/numerics.md)
# Sizes of the probe's deltas relative to the weights, and the bound's largest share of the change that they make.
PROBE_SIZES = (0.25, 0.06, 0.015)
PROBE_SHARE = 0.25
# Least bounds, mean nats. Single tokens of a model with high entropy differ by far more than the mean.
LEAST_BOUND = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 1e-2}
# For a learner that computes a bfloat16 model in float32 (rlsys/architectures/precision.py): its noise is not the
# sampler's.
LEAST_BOUND_ACROSS_PRECISIONS = 1e-1


@dataclass(frozen=True, slots=True)
class BaseCanary:
    """The long canary under the base model, as the learner computes it.

    tokens    (L,) int32
    positions (K,) int64, positions of the compared tokens; grouped by depth, ascending
    logprobs  (K,) float32 nats, of those tokens given all tokens before them
    bounds    mean nats by which a sampler may differ, per depth
    """

    tokens: Array
    positions: Array
    logprobs: Array
    bounds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StartupProbe:
    """What a sampler must prove before it serves: the same base, and adapters that reach its forward pass."""

    base: BaseCanary
    update: WeightUpdate  # of an adapter with large deltas


class Scorer(Protocol):
    """The part of a learner that canaries need."""

    @property
    def max_length(self) -> int: ...

    @property
    def computing_dtype(self) -> str: ...

    def logprobs(self, run_id: str | None, tokens: Array, offsets: Array, /) -> Array: ...

    def eager_logprobs(self, run_id: str | None, tokens: Array, /) -> Array: ...

    def snapshot(self, run_id: str, dtype: str, /) -> AdapterSnapshot: ...

    def probe(self, run_id: str, dtype: str, tokens: Array, size: float, /) -> tuple[AdapterSnapshot, Array, Array]: ...


class Canary:
    """Scores one learner's canaries. `tokens`: (C,) int32 of the model's vocabulary, cut to LONG_TOKENS."""

    def __init__(self, learner: Scorer, dtype: str, tokens: Array) -> None:
        self._learner, self._dtype = learner, dtype
        self._long = np.asarray(tokens, np.int32)[: min(LONG_TOKENS, learner.max_length)]
        self.tokens = self._long[:SHORT_TOKENS]
        self.base = self.score(None)  # (C - 1,) of the short one
        self.bound = self._bound(0.0)  # mean nats by which a sampler of the version published last may differ

    def score(self, run_id: str | None) -> Array:
        """(C - 1,) float32 nats of tokens 1..C-1 of the short canary."""
        return self._learner.logprobs(run_id, self.tokens, np.array([0, len(self.tokens)]))[1:]

    def update(self, run_id: str, current: Array, previous: Array) -> WeightUpdate:
        """`current` and `previous`: the short canary under the run's version and under the version published before."""
        eager = self._learner.eager_logprobs(run_id, self.tokens)[1:]
        self.bound = self._bound(float(np.abs(eager - current).mean()))
        snapshot = self._learner.snapshot(run_id, self._dtype)
        return WeightUpdate(snapshot, self.tokens, current, previous, self.bound)

    def startup(self, run_id: str) -> StartupProbe:
        """The probe adapter has the shape of the run's adapter."""
        tokens, positions = self._long, compared(len(self._long))
        packed = self._learner.logprobs(None, tokens, np.array([0, len(tokens)]))[positions]
        eager = self._learner.eager_logprobs(None, tokens)[positions]
        bounds = [self._bound(float(np.abs(eager - packed)[part].mean())) for *_, part in by_depth(positions)]
        overall = self._bound(float(np.abs(eager - packed).mean()))  # more stable than the bound of one depth
        base = BaseCanary(tokens, positions, packed, tuple(max(overall, each) for each in bounds))
        return StartupProbe(base, self._probe(run_id))

    def _probe(self, run_id: str) -> WeightUpdate:
        """The largest adapter whose effect is well above the noise: with deltas as large as the weights, two kernels of
        a deep bfloat16 model differ by a quarter of the adapter's effect."""
        tried: list[tuple[float, WeightUpdate]] = []
        for size in PROBE_SIZES:
            snapshot, packed, eager = self._learner.probe(run_id, self._dtype, self.tokens, size)
            allowed = self._bound(float(np.abs(eager - packed)[1:].mean()))
            separation = float(np.abs(packed[1:] - self.base).mean())
            update = WeightUpdate(snapshot, self.tokens, packed[1:], self.base, allowed)
            tried.append((allowed / max(separation, 1e-30), update))
            if allowed <= PROBE_SHARE * separation:
                break
        return min(tried, key=lambda each: each[0])[1]

    def _bound(self, noise: float) -> float:
        return bound(noise, self._dtype, self._learner.computing_dtype)


def bound(noise: float, dtype: str, computing_dtype: str) -> float:
    """Largest mean |sampler - learner| in nats that counts as noise, if one of the two has `noise` between its kernels.

    `dtype` is the model's, `computing_dtype` the learner's.
    """
    least = LEAST_BOUND[dtype] if dtype == computing_dtype else LEAST_BOUND_ACROSS_PRECISIONS
    return max(least, BOUND_FACTOR * noise)


def compared(length: int) -> Array:
    """(K,) int64 compared positions of a canary of `length` tokens: the last ones before each depth."""
    depths = [depth for depth in DEPTHS if depth < length] + [length]
    windows = [np.arange(max(1, depth - POSITIONS_PER_DEPTH), depth) for depth in depths]
    return np.unique(np.concatenate(windows)).astype(np.int64)


def by_depth(positions: Array) -> list[tuple[int, int, Array]]:
    """(first position, end, indices into `positions`) of each depth."""
    parts = np.split(np.arange(len(positions)), np.flatnonzero(np.diff(positions) > 1) + 1)
    return [(int(positions[part[0]]), int(positions[part[-1]]) + 1, part) for part in parts]


def canary_tokens(problems: ProblemSet) -> Array:
    """(C,) int32: the first prompts end to end, repeated up to LONG_TOKENS. Fixed text of the task's kind is enough."""
    return np.resize(problems.prompt_tokens[:LONG_TOKENS], LONG_TOKENS).astype(np.int32)
