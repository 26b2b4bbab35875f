"""The loop's stages on a Ray cluster: each takes and returns object references, and waits with a limit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.calls import wait, wait_all
from rlsys.config import JobConfig
from rlsys.errors import WeightSyncError
from rlsys.loop import Facts, Made, Published
from rlsys.types import Array, SamplingParams
from rlsys.weights import Attestation


@dataclass
class ClusterSamplers:
    """Several sampler actors as one: whole groups are dealt out evenly, versions are loaded by all or the run stops."""

    actors: Sequence[Any]
    names: Sequence[str]
    config: JobConfig
    version: int = -1

    def sample(self, split: str, problems: Array, n: int, params: SamplingParams) -> Made:
        start = time.perf_counter()
        shards = [shard for shard in np.array_split(problems, len(self.actors)) if len(shard)]
        calls = [
            actor.sample.remote(split, shard, n, params, self.version)
            for actor, shard in zip(self.actors, shards, strict=False)
        ]
        counts = wait_all(
            [facts for _, facts in calls],
            self.config.run.stage_timeout_s,
            [
                f"{name}: sampling {n} completions of {len(shard)} problems"
                for name, shard in zip(self.names, shards, strict=False)
            ],
        )
        seconds = time.perf_counter() - start
        total = {key: sum(part[key] for part in counts) for key in counts[0]}
        facts = {
            "sampler/completion_tokens_mean": total["tokens"] / total["completions"],
            "sampler/truncated_share": total["truncated"] / total["completions"],
            "sampler/tokens_per_s": total["tokens"] / seconds,
        }
        return Made(tuple(rollouts for rollouts, _ in calls), facts)

    def load(self, update: Published) -> Facts:
        version = update.version
        if version == self.version:  # every group agreed, so the optimizer did not step: the samplers have this one
            return {"sync/bytes": 0.0}
        attestations = wait_all(
            [actor.load.remote(update.ref, self.config.max_canary_diff) for actor in self.actors],
            self.config.run.stage_timeout_s,
            [f"{name}: loading version {version}" for name in self.names],
        )
        refuse_unattested(attestations, self.names, update, self.config.run.name)
        self.version = version
        return {
            "sync/canary_new": max(found.distance_new for found in attestations),
            "sync/canary_previous": min(found.distance_previous for found in attestations),
            "sync/separation": attestations[0].separation,
            "sync/no_power": float(sum(not found.has_power for found in attestations)),
            "sync/bytes": float(update.nbytes),
        }


def refuse_unattested(
    attestations: Sequence[Attestation], names: Sequence[str], update: Published, run_id: str
) -> None:
    """Every sampler must have answered for this version and hold the bits that the learner published.

    Raises:
        WeightSyncError: the sampler that does not.
    """
    for name, found in zip(names, attestations, strict=True):
        if (found.run_id, found.version, found.digest) != (run_id, update.version, update.digest):
            raise WeightSyncError(
                f"{name} serves version {found.version} of {found.run_id!r} with hash {found.digest}; wanted version "
                f"{update.version} of {run_id!r} with hash {update.digest}. It missed a weight sync, so its "
                "completions would come from other weights than the learner's; the run stops here"
            )


@dataclass
class ClusterGraders:
    actor: Any
    config: JobConfig

    def grade(self, split: str, rollouts: Made) -> Made:
        rewards, facts = self.actor.grade.remote(split, *rollouts.ref)
        return Made(rewards, wait(facts, self.config.run.stage_timeout_s, "rewards: grading completions"))

    def show(self, split: str, rollouts: Made, rewards: Made, rows: int) -> list[Any]:
        """The first rows as text with reward and advantage: a few, for people."""
        ref = self.actor.show.remote(split, rows, rewards.ref, *rollouts.ref)
        shown: list[Any] = wait(ref, self.config.run.stage_timeout_s, "rewards: showing completions")
        return shown


@dataclass
class ClusterAdvantages:
    actor: Any
    config: JobConfig

    def centre(self, rollouts: Made, rewards: Made, reference: Made | None) -> Made:
        datums, facts = self.actor.centre.remote(rewards.ref, reference and reference.ref, *rollouts.ref)
        return Made(datums, wait(facts, self.config.run.stage_timeout_s, "advantages: centring rewards"))


@dataclass
class ClusterLearner:
    actor: Any
    config: JobConfig

    def reference(self, rollouts: Made) -> Made:
        logprobs, facts = self.actor.reference.remote(*rollouts.ref)
        return Made(logprobs, wait(facts, self.config.run.stage_timeout_s, "learner: log-probabilities under the base"))

    def step(self, datums: Made, step: int) -> Facts:
        facts: Facts = wait(
            self.actor.step.remote(datums.ref, step), self.config.run.stage_timeout_s, f"learner: step {step}"
        )
        return facts

    def publish(self) -> Published:
        update, label = self.actor.publish.remote()
        return Published(update, **wait(label, self.config.run.stage_timeout_s, "learner: publishing the adapter"))
