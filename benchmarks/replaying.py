"""Replay actors: they answer like the actors of a job, from recorded rollouts, without engine, graders or learner.

They have the methods and return types of the classes in `actors/`, and import neither torch nor vLLM, so that 64 of
them fit on a small machine. A sampler's call takes the length of its longest completion times a fixed time per token.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.reward_actor import RewardActor
from rlsys.advantages import zero_variance_groups
from rlsys.config import JobConfig
from rlsys.rollouts import Rollouts, offsets_of, spans
from rlsys.types import Array

if TYPE_CHECKING:
    from actors.cluster.base_folder import Base
    from actors.hosting.sampler_body import SampleRequest
    from rlsys.datums import DatumBatch
    from rlsys.protocols import MinibatchPosition

WATCH = "watch"


@dataclass(frozen=True, slots=True)
class Recording:
    """G groups of a run, and the R rewards of their completions. Problem p is answered by group p modulo G."""

    rollouts: Rollouts
    rewards: Array  # (R,) float32

    def rows(self, problems: Array, n: int) -> Array:
        """(P n,) the first n completions of the group of each problem."""
        groups = np.asarray(problems) % len(self.rollouts.problems)
        firsts = np.searchsorted(self.rollouts.group, groups)
        counts = np.searchsorted(self.rollouts.group, groups, "right") - firsts
        assert (counts >= n).all(), f"groups of {counts.min()} completions are recorded; wanted {n}"
        rows: Array = (firsts[:, None] + np.arange(n)).ravel()
        return rows

    def answers(self, problems: Array, n: int, longer: int, version: int) -> Rollouts:
        """As a sampler makes them; `longer`: each completion that many times end to end."""
        known, rows = self.rollouts, self.rows(problems, n)
        groups = np.asarray(problems) % len(known.problems)
        starts, lengths = known.prompt_offsets[groups], np.diff(known.prompt_offsets)[groups]
        repeated = np.repeat(rows, longer)
        of_T = spans(known.offsets[repeated], known.lengths[repeated])
        return Rollouts(
            problems=np.asarray(problems),
            prompt_tokens=known.prompt_tokens[spans(starts, lengths)],
            prompt_offsets=offsets_of(lengths),
            group=np.repeat(np.arange(len(problems), dtype=np.int32), n),
            tokens=known.tokens[of_T],
            logprobs=known.logprobs[of_T],
            versions=np.full(len(of_T), version, np.int32),
            offsets=offsets_of(known.lengths[rows] * longer),
            stop_reasons=known.stop_reasons[rows],
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """Replaces WeightUpdate, whose module imports torch; has the same number of bytes."""

    version: int
    buffer: Array  # uint8


@dataclass(frozen=True, slots=True)
class Attested:
    """Replaces Attestation, for the same reason."""

    run_id: str
    version: int
    digest: str
    distance_new: float = 0.0
    distance_previous: float = 0.0
    separation: float = 0.0
    has_power: bool = False


class ReplayingSampler:
    """Replay actor with the methods of SamplerActor."""

    def __init__(self, config: JobConfig, index: int) -> None:
        self.run_id, self.longer, self.pace, self.done = config.run.name, 1, 0.0, 0
        self.dtype = config.model.dtype

    async def process(self) -> tuple[int, str, str]:
        """There is no host process beside this one."""
        return os.getpid(), "", self.dtype

    async def preload(self) -> None:
        """There is nothing to import."""

    async def start(self, base: Recording) -> None:
        self.recording = base

    async def join(self, train: Any, held_out: Any, probe: Weights, bound: float | None) -> Attested:
        return self._attested(probe)

    async def load(self, update: Weights, bound: float | None, reload: bool = False) -> Attested:
        return self._attested(update)

    async def set(self, longer: int, pace: float) -> None:
        self.longer, self.pace = longer, pace

    @ray.method(num_returns=2)
    async def sample(self, request: SampleRequest) -> tuple[Rollouts, dict[str, float]]:
        rollouts = self.recording.answers(request.problems, request.n, self.longer, request.version)
        await asyncio.sleep(float(rollouts.lengths.max()) / self.longer * self.pace)
        self.done += 1
        return rollouts, rollouts.counts()

    async def progress(self) -> int:
        return self.done

    async def stop(self) -> None:
        """Nothing runs behind it."""

    def _attested(self, update: Weights) -> Attested:
        return Attested(self.run_id, update.version, digest_of(update.version))


class ReplayingRewards(RewardActor):
    """The real RewardActor with recorded grades."""

    def start(self, base: Base | Recording) -> str:
        assert isinstance(base, Recording)
        self.started: Any = RecordedGrades(base)
        return ""


@dataclass(frozen=True, slots=True)
class Grades:
    rewards: Array
    grade: Array
    passed: Array
    idle: Array
    metrics: Mapping[str, float]
    failure: str = ""


class RecordedGrades:
    """Replaces `rlsys.rewards.grader.Grader`: decodes no texts and runs no graders."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.pool, self.done = recording, self, 0

    def grade(self, split: str, rollouts: Rollouts) -> Grades:
        P = len(rollouts.problems)
        n = len(rollouts.group) // P
        rewards = self.recording.rewards[self.recording.rows(rollouts.problems, n)].astype(np.float32)
        self.done += 1
        return Grades(
            rewards=rewards,
            grade=np.bincount(rollouts.group, rewards, minlength=P) / n,
            passed=np.bincount(rollouts.group, rewards >= 1, minlength=P).astype(np.int64),
            idle=zero_variance_groups(rewards, rollouts.group, P),  # every job here has a baseline
            metrics={"reward/mean": float(rewards.mean()), "reward/completions": float(len(rewards))},
        )

    def progress(self) -> int:
        return self.done

    def close(self) -> None:
        """There is no pool of processes."""


class ReplayingLearner:
    """Replay actor with the methods of LearnerActor, for one rank."""

    def __init__(self, dtype: str, adapter_bytes: int, seconds: float) -> None:
        self.dtype, self.version, self.seconds = dtype, 0, seconds
        self.buffer = np.random.default_rng(0).integers(0, 256, adapter_bytes, np.uint8)

    def load(self, base: Any, meeting_point: str | None) -> str:
        """There is no model to load."""
        return self.dtype

    def start(self, train: Any, files: Any) -> None:
        """There is no run to resume."""

    def not_forked(self) -> str:
        """Nobody expected it to be."""
        return ""

    def probe(self) -> Weights:
        return Weights(-1, self.buffer)

    @ray.method(num_returns=2)
    def learn(self, datums: DatumBatch, position: MinibatchPosition) -> tuple[Array, dict[str, float]]:
        time.sleep(self.seconds)
        self.version += position.last
        tokens = float(np.count_nonzero(datums.columns["weights"]))
        metrics = {"loss/sum": 0.0, "policy/tokens": tokens, "policy/logprob_diff_mean": 0.0}
        return datums.columns["logprobs"].copy(), metrics

    @ray.method(num_returns=2)
    def publish(self) -> tuple[Weights, dict[str, Any]]:
        label = {"version": self.version, "digest": digest_of(self.version), "nbytes": self.buffer.nbytes}
        return Weights(self.version, self.buffer), label

    def state_files(self) -> dict[str, bytes]:
        """Adapter and the two moments of Adam, in float32 as the adapter here."""
        return {name: self.buffer.tobytes() for name in ("adapter", "first", "second")}

    @ray.method(concurrency_group=WATCH)
    def progress(self) -> int:
        return self.version


def digest_of(version: int) -> str:
    return f"version {version}"
