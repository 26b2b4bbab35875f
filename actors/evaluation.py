"""One policy on the held-out problems, on a cluster of its own or beside jobs: everything real, nothing trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from actors.cluster.placement import Placement
from actors.cluster.processors import refuse_absent_cores
from actors.cluster.ray_cluster import cluster, refuse_other_builds
from actors.faults.actor_logs import Failures
from actors.faults.interrupts import Interrupts
from actors.stages.learner_group import LearnerGroup, LearnerInit
from actors.stages.sampler_pool import SamplerInit, SamplerPool
from actors.stages.stateless_actors import GraderActors
from rlsys.architectures.support import refuse_unsupported_job
from rlsys.config import JobConfig
from rlsys.data.dedup import refuse_shared
from rlsys.data.problems import ProblemSet
from rlsys.errors import RlsysError
from rlsys.evaluation.evaluate import EvalResult, evaluate_policy
from rlsys.evaluation.policy_source import PolicySource
from rlsys.evaluation.record import EvalRecord, GradedCompletion
from rlsys.modeling.base_model import pack_folder
from rlsys.planning.model_folder import check_job
from rlsys.protocols import PublishedAdapter, RolledBack
from rlsys.run_state.resume import Resume
from rlsys.tracking.learning_checks import LearningChecks
from rlsys.tracking.progress import Progress
from rlsys.tracking.system_metrics import environment

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded:
    """In place of a run's store: what the learner begins with, and comes back with should it die."""

    resume: Resume | None

    def latest(self) -> Resume | None:
        return self.resume


@dataclass(frozen=True, slots=True)
class EvalActors:
    learner: LearnerGroup
    samplers: SamplerPool
    graders: GraderActors


def evaluate(config: JobConfig, policy: PolicySource, progress: Progress) -> EvalRecord:
    """Whatever this raises, the actors are gone, and nothing has been written.

    Raises:
        CheckpointError, ConfigError: the adapter is not of this base, or its run trains on the problems that it would
            be evaluated on; no engine has been started.
        RlsysError: whatever stopped it, as one readable cause.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    refuse_other_builds(config.cluster, config.sampler_device, config.learner.device)
    refuse_unsupported_job(policy.config)
    refuse_absent_cores(config.cluster.address, None, policy.config.sampler)
    for note in check_job(policy.config):
        progress.note(f"rlsys: {note}")
    failures, own, interrupts = Failures(), _own(policy.config), Interrupts(progress.note)
    try:
        # Watched again once Ray is up: it puts its own handler of SIGTERM in place, which aborts the process.
        with interrupts.watched(), cluster(config.cluster) as where, interrupts.watched():
            progress.note(f"rlsys: evaluating {policy.kind} {policy.path} on {where}")
            with _eval_actors(own, policy, failures, progress) as actors:
                base = policy.base
                packed = ray.put(pack_folder(base)) if isinstance(base, Path) else base
                with progress.stage("loading the policy", None):
                    problems = _start(actors, packed, policy.trained)
                with progress.stage("evaluating", None):
                    result = _evaluated(own, actors, len(problems))
        for sign in LearningChecks(config.model_dump(mode="json")).see(0, result.metrics):
            progress.note(f"rlsys: {sign}")
    except RlsysError as error:
        raise type(error)(failures.report(error)) from error
    return EvalRecord(
        kind=policy.kind,
        name=policy.name,
        checkpoint=policy.path,
        base=str(policy.base),
        version=policy.version,
        time=time.time(),
        config=config.model_dump(mode="json"),
        versions=environment(),
        facts=result.metrics,
        confidence=config.eval.confidence,
        problems=_rows(problems, result),
    )


def _own(config: JobConfig) -> JobConfig:
    """Under a name of its own, so that a job of the same configuration is not met on the cluster."""
    run = config.run.model_copy(update={"name": f"{config.run.name}.eval"})
    return config.model_copy(update={"run": run})


@contextmanager
def _eval_actors(
    config: JobConfig, policy: PolicySource, failures: Failures, progress: Progress
) -> Iterator[EvalActors]:
    """The actors; gone when the block ends, engines first."""
    note = progress.note
    resume = Resume(Path(policy.path), 0, b"", policy.files) if policy.files else None
    with ExitStack() as stack:
        placement = Placement(config, note)
        stack.callback(placement.release)
        rank_slots, sampler_slots = placement.reserve()
        learner = LearnerGroup(config, Loaded(resume), failures, note)
        stack.callback(learner.close)
        learner.launch(rank_slots)
        graders = GraderActors(config, failures, note)
        stack.callback(graders.close)
        samplers = SamplerPool(config, placement, failures, note)
        stack.callback(samplers.close)
        samplers.launch(sampler_slots)
        yield EvalActors(learner, samplers, graders)


def _start(actors: EvalActors, base: Any, trained: Sequence[str]) -> ProblemSet:
    """Returns the held-out problems. What cannot be evaluated is refused before any engine starts: an adapter of
    another base, or one that was trained on these problems."""
    actors.graders.start(base)
    train, held_out = (actors.graders.problems(split) for split in ("train", "eval"))
    problems: ProblemSet = ray.get(held_out)
    refuse_shared(trained, problems.prompts)
    actors.learner.start(LearnerInit(base, train))
    actors.samplers.begin(base, train, held_out)
    actors.samplers.start(SamplerInit(base, train, held_out, _retry(actors.learner.probe)))

    def renew() -> tuple[SamplerInit, PublishedAdapter]:
        train, held_out = (actors.graders.problems(split) for split in ("train", "eval"))
        return SamplerInit(base, train, held_out, actors.learner.probe()), actors.learner.publish()

    actors.samplers.renew = renew
    return problems


def _evaluated(config: JobConfig, actors: EvalActors, problems: int) -> EvalResult:
    def load_and_evaluate() -> EvalResult:
        actors.samplers.load(actors.learner.publish())
        return evaluate_policy(config, actors.samplers, actors.graders, np.arange(problems))

    return _retry(load_and_evaluate)


def _retry(act: Callable[[], T]) -> T:
    """Nothing here changes what it works on, so what is lost is only done again."""
    while True:
        try:
            return act()
        except RolledBack:
            continue


def _rows(problems: ProblemSet, result: EvalResult) -> list[GradedCompletion]:
    grades = result.grades.grade.tolist()
    passed = [None] * len(problems) if result.passed is None else result.passed.tolist()
    asked = zip(problems.prompts, problems.answers, grades, passed, strict=True)
    return [GradedCompletion(i, prompt, answer, grade, right) for i, (prompt, answer, grade, right) in enumerate(asked)]
