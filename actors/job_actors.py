"""Actors of a job or an evaluation: reserved, launched, started, and gone when their block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import ray

from actors.cluster.column_refs import BaseRef
from actors.cluster.placement import Placement
from actors.faults.actor_logs import Failures, process_of
from actors.forking.servers import NO_SERVERS, ForkServers
from actors.stages.checkpointer import BackgroundCheckpointer
from actors.stages.learner_group import LearnerGroup, LearnerInit
from actors.stages.restarting_actors import AdvantageActors, GraderActors
from actors.stages.sampler_pool.membership import SamplerInit
from actors.stages.sampler_pool.pool import SamplerPool
from rlsys.config import JobConfig
from rlsys.config.gpu_shares import may_share
from rlsys.protocols import PublishedAdapter, RolledBack
from rlsys.run_state.run_dir import RunStore
from rlsys.types import Array

T = TypeVar("T")
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PolicyActors:
    """The stages that sample and grade a policy."""

    learner: LearnerGroup
    samplers: SamplerPool
    graders: GraderActors

    def begin(self, base: BaseRef) -> None:
        """Have the learner load the base and the engines start, without waiting. Engines that share its GPUs start
        later."""
        self.learner.begin(base)
        if not may_share(self.learner.config.learner, self.learner.config.sampler):
            self.samplers.membership.begin(base)

    def start(self, base: BaseRef) -> None:
        """Load the base on every actor, and have every sampler prove that adapters reach its forward pass. The graders
        have been started. Engines that have not begun to start do so once the learner has loaded its base."""
        train, held_out = (self.graders.problems(split) for split in ("train", "eval"))
        self.learner.start(LearnerInit(base, train))
        self.samplers.membership.begin(base)
        self.samplers.membership.start(SamplerInit(base, train, held_out, retry(self.learner.probe)))

    def ask_to_stop(self) -> None:
        """Begin the end of the job, without waiting: engines and graders stop at the same time."""
        self.samplers.membership.ask_to_stop()
        self.graders.ask_to_stop()


@dataclass(frozen=True, slots=True)
class JobActors:
    """The stages of a training job."""

    policy: PolicyActors
    checkpointer: BackgroundCheckpointer

    def pids(self) -> dict[str, list[int]]:
        """Processes of the actors on the driver's node, by name; host processes and engines count with their
        sampler."""
        here = ray.get_runtime_context().get_node_id()
        actors = {f"sampler{member.index}": member.actor for member in self.policy.samplers.members}
        actors |= {f"learner{rank}": actor for rank, actor in enumerate(self.policy.learner.ranks)}
        actors |= {"rewards": self.policy.graders.actor}
        processes = {name: process_of(actor) for name, actor in actors.items()}
        pids = {name: [process.pid] for name, process in processes.items() if process and process.node == here}
        for member in self.policy.samplers.members:  # a forked host is no child of its actor
            name = f"sampler{member.index}"
            if name in pids and member.host_pid is not None:
                pids[name].append(member.host_pid)
        return pids


@contextmanager
def policy_actors(
    config: JobConfig,
    learner: LearnerGroup,
    failures: Failures,
    note: Note,
    between: Callable[[], None] = lambda: None,
    resampled: Callable[[Array], None] = lambda problems: None,
    servers: ForkServers = NO_SERVERS,
) -> Iterator[PolicyActors]:
    """Launch learner, graders and samplers; when the block ends they are closed, the learner last. ``between`` and
    ``resampled``: see `SamplerPool`."""
    with ExitStack() as stack:
        placement = Placement(config, note)
        stack.callback(placement.release)
        rank_slots, sampler_slots = placement.reserve()
        stack.enter_context(servers.for_slots([*rank_slots, *sampler_slots], note))

        def renew() -> tuple[SamplerInit, PublishedAdapter]:
            assert graders.base is not None
            train, held_out = (graders.problems(split) for split in ("train", "eval"))
            return SamplerInit(graders.base, train, held_out, learner.probe()), learner.publish()

        samplers = SamplerPool(config, placement, failures, note, renew, between, resampled, servers)
        stack.callback(learner.close)
        stack.callback(samplers.close)
        samplers.membership.launch(sampler_slots)  # first: an engine takes longest
        learner.launch(rank_slots)
        graders = GraderActors(config, failures, note, servers)
        stack.callback(graders.close)
        actors = PolicyActors(learner, samplers, graders)
        stack.callback(actors.ask_to_stop)
        yield actors


@contextmanager
def job_actors(
    config: JobConfig,
    store: RunStore,
    failures: Failures,
    note: Note,
    between: Callable[[], None],
    resampled: Callable[[Array], None],
    servers: ForkServers,
) -> Iterator[JobActors]:
    """As `policy_actors`, with checkpoints."""
    with ExitStack() as stack:
        learner = LearnerGroup(config, store, failures, note, servers)
        checkpointer = BackgroundCheckpointer(config.rl.steps, config.watchdog, store, learner)
        stack.callback(checkpointer.close)  # after the learner is gone
        policy = stack.enter_context(policy_actors(config, learner, failures, note, between, resampled, servers))
        stack.callback(checkpointer.finish)
        yield JobActors(policy, checkpointer)


@contextmanager
def advantage_actors(
    config: JobConfig, failures: Failures, note: Note, servers: ForkServers
) -> Iterator[AdvantageActors]:
    """The actor starts during the first evaluation, or while the first step is sampled."""
    actors = AdvantageActors(config.rl, config.watchdog, config.cluster.max_restarts, failures, note, servers)
    try:
        yield actors
    finally:
        actors.close()


def retry(act: Callable[[], T]) -> T:
    """Repeat a call whose loss changes nothing, until nothing is lost."""
    while True:
        try:
            return act()
        except RolledBack:
            continue
