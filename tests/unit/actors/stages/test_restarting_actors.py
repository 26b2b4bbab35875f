"""Requests to the graders' actor, and restarts of actors without state; no cluster is needed for these."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import ray

from actors.faults.actor_logs import Failures
from actors.reward_actor import RewardActor, ShowRequest
from actors.stages.restarting_actors import RestartingActor, first_rows
from rlsys.advantages import to_minibatches
from rlsys.config import JobConfig, parse_config
from rlsys.errors import ActorDiedError
from rlsys.grading.samples import LearnedBatch, _token_values
from rlsys.protocols import DatumsRef, Ref, RewardsRef, RolloutsRef, TrainedStep
from rlsys.rollouts import Rollouts, concatenate
from rlsys.types import Array


def job() -> JobConfig:
    return parse_config("{run: {name: toy}, model: {path: x}, rl: {samples_per_problem: 2}}")


def groups(first: int, count: int) -> Rollouts:
    """Groups of two completions of 2 tokens after a prompt of 1; a token's number is that of its completion."""
    R = 2 * count
    return Rollouts(
        problems=np.arange(first, first + count),
        prompt_tokens=np.full(count, 9, np.int32),
        prompt_offsets=np.arange(count + 1),
        group=np.repeat(np.arange(count), 2).astype(np.int32),
        tokens=np.repeat(2 * first + np.arange(R), 2).astype(np.int32),
        logprobs=np.zeros(2 * R, np.float32),
        versions=np.zeros(2 * R, np.int32),
        offsets=2 * np.arange(R + 1),
        stop_reasons=np.zeros(R, np.int8),
    )


class Seen:
    """A ``Grader`` that keeps what it was to show."""

    def show(
        self, split: str, rows: int, rollouts: Rollouts, rewards: Array, learned: LearnedBatch
    ) -> list[list[float]]:
        return [_token_values(rollouts, r, learned)[0] for r in range(len(rewards))]


def test_completions_are_shown_with_their_own_advantages_where_pieces_were_centred_one_by_one() -> None:
    config, actor = job(), RewardActor(job())
    actor.started = Seen()  # type: ignore[assignment]
    parts, rewards = [groups(0, 2), groups(2, 1)], [np.array([0.0, 1.0, 1.0, 1.0]), np.array([1.0, 0.0])]
    datums: list[DatumsRef] = []
    refs: list[Any] = []
    rows: list[Any] = []
    logprobs: list[Array] = []
    for part, rewards_R in zip(parts, rewards, strict=True):
        batches, numbers, metrics, outcomes = to_minibatches(part, rewards_R, config.rl, 1)
        datums.append(DatumsRef(tuple(map(Ref, batches)), metrics, tuple(map(Ref, numbers)), outcomes))
        refs, rows = [*refs, *batches], [*rows, *numbers]
        logprobs.append(np.zeros(len(batches[0].tokens), np.float32))
    none = np.empty(0)
    trained = TrainedStep(
        0, np.arange(3), RolloutsRef((), {}), RewardsRef((), {}, none, none, none), None, datums, learned=[]
    )
    firsts = first_rows(trained, config.rl.samples_per_problem)
    assert firsts == [0, 4]
    request = ShowRequest("train", 6, tuple(firsts), (1, 1, 2, 2, 2))
    shown: list[Any] = actor.show(request, concatenate(parts), np.concatenate(rewards), *refs, *rows, *logprobs)
    assert shown == [[-0.5, -0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [0.5, 0.5], [-0.5, -0.5]]


def test_a_death_that_two_threads_see_is_healed_once_and_none_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    stage = RestartingActor("rewards", object, job(), Failures(), lambda text: None)
    dead, death = stage.actor, ActorDiedError("gone")
    threads = [threading.Thread(target=stage._restart, args=(death, dead)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stage.deaths == 1 and stage.actor is not dead
    stage.close()
    with pytest.raises(ActorDiedError, match="gone"):
        stage._restart(death, stage.actor)
