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

from actors.cluster import cluster, refuse_other_builds
from actors.interrupts import Interrupts
from actors.learner_group import Given, LearnerGroup
from actors.light_stages import RestartedGraders
from actors.logs import Failures
from actors.placement import Placement
from actors.processors import refuse_absent_cores
from actors.sampler_pool import Needed, SamplerPool
from rlsys.base import pack_folder
from rlsys.candidates import Candidate
from rlsys.config import JobConfig
from rlsys.errors import RlsysError
from rlsys.evaluation_record import Graded, Record
from rlsys.learning_checks import LearningChecks
from rlsys.measuring import Measured, measure
from rlsys.model_folder import check_job
from rlsys.model_support import refuse_unsupported_job
from rlsys.problems import ProblemSet
from rlsys.progress import Progress
from rlsys.run_store import Resume
from rlsys.splits import refuse_shared
from rlsys.stages import Published, Rewound
from rlsys.system import environment

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded:
    """In place of a run's store: what the learner begins with, and comes back with should it die."""

    resume: Resume | None

    def latest(self) -> Resume | None:
        return self.resume


@dataclass(frozen=True, slots=True)
class Cast:
    learner: LearnerGroup
    samplers: SamplerPool
    graders: RestartedGraders


def evaluate(config: JobConfig, candidate: Candidate, progress: Progress) -> Record:
    """Whatever this raises, the actors are gone, and nothing has been written.

    Raises:
        CheckpointError, ConfigError: the adapter is not of this base, or its run trains on the problems that it would
            be evaluated on; no engine has been started.
        RlsysError: whatever stopped it, as one readable cause.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    refuse_other_builds(config.cluster, config.sampler_device, config.learner.device)
    refuse_unsupported_job(candidate.config)
    refuse_absent_cores(config.cluster.address, None, candidate.config.sampler)
    for note in check_job(candidate.config):
        progress.note(f"rlsys: {note}")
    failures, own, interrupts = Failures(), _own(candidate.config), Interrupts(progress.note)
    try:
        # Watched again once Ray is up: it puts its own handler of SIGTERM in place, which aborts the process.
        with interrupts.watched(), cluster(config.cluster) as where, interrupts.watched():
            progress.note(f"rlsys: evaluating {candidate.kind} {candidate.path} on {where}")
            with _cast(own, candidate, failures, progress) as cast:
                base = candidate.base
                packed = ray.put(pack_folder(base)) if isinstance(base, Path) else base
                with progress.stage("loading the policy", None):
                    problems = _start(cast, packed, candidate.trained)
                with progress.stage("evaluating", None):
                    measured = _measured(own, cast, len(problems))
        for sign in LearningChecks(config.model_dump(mode="json")).see(0, measured.facts):
            progress.note(f"rlsys: {sign}")
    except RlsysError as error:
        raise type(error)(failures.report(error)) from error
    return Record(
        kind=candidate.kind,
        name=candidate.name,
        checkpoint=candidate.path,
        base=str(candidate.base),
        version=candidate.version,
        time=time.time(),
        config=config.model_dump(mode="json"),
        versions=environment(),
        facts=measured.facts,
        confidence=config.eval.confidence,
        problems=_rows(problems, measured),
    )


def _own(config: JobConfig) -> JobConfig:
    """Under a name of its own, so that a job of the same configuration is not met on the cluster."""
    run = config.run.model_copy(update={"name": f"{config.run.name}.eval"})
    return config.model_copy(update={"run": run})


@contextmanager
def _cast(config: JobConfig, candidate: Candidate, failures: Failures, progress: Progress) -> Iterator[Cast]:
    """The actors; gone when the block ends, engines first."""
    note = progress.note
    resume = Resume(Path(candidate.path), 0, b"", candidate.files) if candidate.files else None
    with ExitStack() as ending:
        placement = Placement(config, note)
        ending.callback(placement.release)
        rank_seats, sampler_seats = placement.reserve()
        learner = LearnerGroup(config, Loaded(resume), failures, note)
        ending.callback(learner.close)
        learner.launch(rank_seats)
        graders = RestartedGraders(config, failures, note)
        ending.callback(graders.close)
        samplers = SamplerPool(config, placement, failures, note)
        ending.callback(samplers.close)
        samplers.launch(sampler_seats)
        yield Cast(learner, samplers, graders)


def _start(cast: Cast, base: Any, trained: Sequence[str]) -> ProblemSet:
    """Returns the held-out problems. What cannot be evaluated is refused before any engine starts: an adapter of
    another base, or one that was trained on these problems."""
    cast.graders.start(base)
    train, held_out = (cast.graders.problems(split) for split in ("train", "eval"))
    problems: ProblemSet = ray.get(held_out)
    refuse_shared(trained, problems.prompts)
    cast.learner.start(Given(base, train))
    cast.samplers.begin(base, train, held_out)
    cast.samplers.start(Needed(base, train, held_out, _again(cast.learner.probe)))

    def renew() -> tuple[Needed, Published]:
        train, held_out = (cast.graders.problems(split) for split in ("train", "eval"))
        return Needed(base, train, held_out, cast.learner.probe()), cast.learner.publish()

    cast.samplers.renew = renew
    return problems


def _measured(config: JobConfig, cast: Cast, problems: int) -> Measured:
    def load_and_measure() -> Measured:
        cast.samplers.load(cast.learner.publish())
        return measure(config, cast.samplers, cast.graders, np.arange(problems))

    return _again(load_and_measure)


def _again(act: Callable[[], T]) -> T:
    """Nothing here changes what it works on, so what is lost is only done again."""
    while True:
        try:
            return act()
        except Rewound:
            continue


def _rows(problems: ProblemSet, measured: Measured) -> list[Graded]:
    grades = measured.grades.grade.tolist()
    passed = [None] * len(problems) if measured.passed is None else measured.passed.tolist()
    asked = zip(problems.prompts, problems.answers, grades, passed, strict=True)
    return [Graded(i, prompt, answer, grade, right) for i, (prompt, answer, grade, right) in enumerate(asked)]
