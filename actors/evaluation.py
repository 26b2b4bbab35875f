"""Evaluation of one policy on the held-out problems, on its own cluster or beside jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from actors.cluster.column_refs import BaseRef
from actors.cluster.processors import refuse_absent_cores
from actors.cluster.ray_cluster import cluster, refuse_other_builds
from actors.faults.actor_logs import Failures
from actors.faults.interrupts import Interrupts
from actors.forking.job_server import ForkServer
from actors.forking.model_check import check_job
from actors.forking.servers import fork_servers
from actors.job_actors import PolicyActors, policy_actors, retry
from actors.stages.learner_group import LearnerGroup
from rlsys.architectures.support import refuse_unsupported_job
from rlsys.config import JobConfig
from rlsys.data.dedup import refuse_shared
from rlsys.data.problems import ProblemSet
from rlsys.errors import RlsysError
from rlsys.evaluation.evaluate import EvalResult, evaluate_policy
from rlsys.evaluation.policy_source import PolicySource
from rlsys.evaluation.record import EvalRecord, GradedCompletion
from rlsys.protocols import Ref
from rlsys.run_state.resume import Resume
from rlsys.tracking.learning_checks import LearningChecks
from rlsys.tracking.progress import Progress
from rlsys.tracking.system_metrics import environment
from rlsys.utils.packed_folder import pack_folder


@dataclass(frozen=True, slots=True)
class Loaded:
    """In place of a run's store: the checkpoint that the learner starts and restarts from."""

    resume: Resume | None

    def latest(self) -> Resume | None:
        return self.resume


def evaluate(
    config: JobConfig,
    policy: PolicySource,
    progress: Progress,
    server: ForkServer | None = None,
    check: Callable[[], tuple[str, ...]] | None = None,
) -> EvalRecord:
    """Whatever this raises, the actors are gone, and nothing has been written. `server`: forks the actors where Ray
    starts here. `check`: `check_job` of the policy's configuration, where it has begun already.

    Raises:
        CheckpointError, ConfigError: the adapter is of another base, or its run trains on held-out problems; nothing
            has been sampled.
        RlsysError: the error that stopped the evaluation.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    refuse_other_builds(config.cluster, config.sampler_device, config.learner.device)
    refuse_unsupported_job(policy.config)
    refuse_absent_cores(config.cluster.address, None, policy.config.sampler)
    for note in check() if check else check_job(policy.config):
        progress.note(f"rlsys: {note}")
    failures, own, interrupts = Failures(), _renamed(policy.config), Interrupts(progress.note)
    try:
        # Again once Ray is up: it installs its own handler of SIGTERM, which aborts the process.
        with interrupts.watched(), cluster(config.cluster) as where, interrupts.watched():
            progress.note(f"rlsys: evaluating {policy.kind} {policy.path} on {where}")
            resume = Resume(Path(policy.path), 0, b"", policy.files) if policy.files else None
            servers = fork_servers(server, own, progress.note)
            learner = LearnerGroup(own, Loaded(resume), failures, progress.note, servers)
            with policy_actors(own, learner, failures, progress.note, servers=servers) as actors:
                base = policy.base
                packed: BaseRef = Ref(ray.put(pack_folder(base))) if isinstance(base, Path) else base
                with progress.stage("loading the policy", None):
                    problems = _start(actors, packed, policy.trained)
                with progress.stage("evaluating", None):
                    result = _evaluate(own, actors, len(problems))
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
        confidence=result.evaluation.confidence,
        problems=_rows(problems, result),
    )


def _renamed(config: JobConfig) -> JobConfig:
    """With another run name, which does not collide with the job's on the cluster."""
    run = config.run.model_copy(update={"name": f"{config.run.name}.eval"})
    return config.model_copy(update={"run": run})


def _start(actors: PolicyActors, base: BaseRef, trained: Sequence[str]) -> ProblemSet:
    """Returns the held-out problems. An adapter of another base, or one that was trained on these problems, is refused
    before anything is sampled."""
    actors.begin(base)
    actors.graders.start(base)
    problems: ProblemSet = ray.get(actors.graders.problems("eval").value)
    refuse_shared(trained, problems.prompts)
    actors.start(base)
    return problems


def _evaluate(config: JobConfig, actors: PolicyActors, problems: int) -> EvalResult:
    def load_and_evaluate() -> EvalResult:
        actors.samplers.load(actors.learner.publish())
        return evaluate_policy(config, actors.samplers, actors.graders, np.arange(problems))

    return retry(load_and_evaluate)


def _rows(problems: ProblemSet, result: EvalResult) -> list[GradedCompletion]:
    grades = result.grades.grade.tolist()
    passed = [None] * len(problems) if result.passed is None else result.passed.tolist()
    asked = zip(problems.prompts, problems.answers, grades, passed, strict=True)
    return [GradedCompletion(i, prompt, answer, grade, right) for i, (prompt, answer, grade, right) in enumerate(asked)]
