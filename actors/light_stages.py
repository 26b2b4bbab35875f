"""Graders and advantages as stages: actors without a state of their own, started again where they die."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.advantage_actor import GroupAdvantageActor
from actors.logs import Failures
from actors.reward_actor import RewardActor
from actors.watchdog import Watchdog, watched
from rlsys.config import JobConfig
from rlsys.errors import ActorDiedError, DataLostError
from rlsys.stages import Centred, Made, Rewound

STOP_TIMEOUT_S = 5.0  # for the grader processes to end by themselves


def light() -> dict[str, Any]:
    """They run while learner and samplers wait, so they hold no core of their own; and they live where the driver does,
    since what they made is needed for as long as it lives. (Ray 2.60 does not heed soft affinity without a core.)"""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


class Restarted:
    """An actor that is made again when it dies, and its call repeated: nothing that it does is lost with it."""

    def __init__(
        self, who: str, make: Callable[[], Any], config: JobConfig, failures: Failures, note: Callable[[str], None]
    ) -> None:
        self.who, self.make, self.config, self.failures, self.note = who, make, config, failures, note
        self.actor = make()
        self.deaths = 0  # without a call that was answered in between

    def call(self, stage: str, what: str, method: str, *arguments: Any) -> tuple[Any, Any]:
        """(reference to the first result, the second result) of a method with two.

        Raises:
            Rewound: what it was to work on is lost with its node; the step has to be done again.
            ActorDiedError: it died more often than cluster.max_restarts allows.
        """
        while True:
            made, facts = getattr(self.actor, method).remote(*arguments)
            try:
                answer = self._wait(facts, stage, what)
            except ActorDiedError as error:
                self._restart(error)
            except DataLostError as error:
                self.note(f"{self.who}: {what}: the step is done again, what it worked on is lost: {error}")
                raise Rewound(None) from error
            else:
                self.deaths = 0
                return made, answer

    def ask(self, stage: str, what: str, method: str, *arguments: Any) -> Any:
        """The only result of a method."""
        return self._wait(getattr(self.actor, method).remote(*arguments), stage, what)

    def close(self) -> None:
        ray.kill(self.actor)

    def started(self) -> None:
        """Called once the actor has been made anew; what else it needs to be whole again."""

    def _wait(self, ref: Any, stage: str, what: str) -> Any:
        limit = getattr(self.config.watchdog, f"{stage}_s")
        return watched(ref, Watchdog(stage, limit, self.failures), self.who, what, self.actor)

    def _restart(self, error: ActorDiedError) -> None:
        while True:
            ray.kill(self.actor)
            self.deaths += 1
            limit = self.config.cluster.max_restarts
            if self.deaths > limit:
                raise self.failures.gone(f"{self.who} died {self.deaths} times without finishing a call", limit)
            self.note(f"{self.who} died and is replaced ({self.deaths} of {limit}): {str(error).splitlines()[0]}")
            self.actor = self.make()
            try:
                return self.started()
            except ActorDiedError as again:
                error = again


class RestartedGraders(Restarted):
    """The loop's ``Graders``."""

    def __init__(self, config: JobConfig, failures: Failures, note: Callable[[str], None]) -> None:
        remote = ray.remote(concurrency_groups={"watch": 1})(RewardActor).options(**light())
        super().__init__("rewards", lambda: remote.remote(config), config, failures, note)
        self.base: Any = None

    def start(self, base: Any) -> None:
        self.base = base
        try:
            self.started()
        except ActorDiedError as error:
            self._restart(error)

    def started(self) -> None:
        self.ask("start", "starting", "start", self.base)

    def problems(self, split: str) -> Any:
        """A reference to a problem set."""
        return self.actor.problems.remote(split)

    def grade(self, split: str, rollouts: Made) -> Made:
        return Made(*self.call("grade", "grading completions", "grade", split, *rollouts.ref))

    def show(self, split: str, rollouts: Made, rewards: Made, rows: int) -> list[Any]:
        """The first rows as text with reward and advantage: a few, for people. None where they are lost."""
        try:
            shown: list[Any] = self.ask("grade", "showing completions", "show", split, rows, rewards.ref, *rollouts.ref)
        except (ActorDiedError, DataLostError) as error:
            self.note(f"rewards: the rollouts of this step cannot be shown: {error}")
            if isinstance(error, ActorDiedError):
                self._restart(error)
            return []
        return shown

    def close(self) -> None:
        ray.wait([self.actor.stop.remote()], timeout=STOP_TIMEOUT_S)
        super().close()


class RestartedAdvantages(Restarted):
    """The loop's ``Advantages``."""

    def __init__(self, config: JobConfig, failures: Failures, note: Callable[[str], None]) -> None:
        remote = ray.remote(GroupAdvantageActor).options(**light())
        super().__init__("advantages", lambda: remote.remote(config.rl.advantages), config, failures, note)

    def centre(self, rollouts: Made, rewards: Made, reference: Made | None) -> Centred:
        datums, (facts, outcomes) = self.call(
            "advantage", "centring rewards", "centre", rewards.ref, reference and reference.ref, *rollouts.ref
        )
        return Centred(datums, facts, outcomes)
