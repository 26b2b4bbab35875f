"""One training job from configuration to report: puts the parts together, runs the loop, leaves nothing behind."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.advantage_actor import GroupAdvantageActor
from actors.calls import wait, wait_all
from actors.cluster import LIGHT, cluster, refuse_shortfall, threads_env
from actors.interrupts import Interrupts
from actors.learner_actor import LearnerActor
from actors.reward_actor import RewardActor
from actors.sampler_actor import SamplerActor
from actors.stages import ClusterAdvantages, ClusterGraders, ClusterLearner, ClusterSamplers
from rlsys import loop, losses
from rlsys.base import unpack_folder
from rlsys.config import JobConfig
from rlsys.errors import ConfigError, RunExistsError, StalledError
from rlsys.loop import Facts, Made, Stages
from rlsys.problems import Epochs
from rlsys.progress import Progress
from rlsys.report import write_report
from rlsys.tracking import RolloutRow, Tracker

STOP_TIMEOUT_S = 5.0  # for engines to end by themselves before their actors are killed
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. Accuracies are NaN where no evaluation took place."""

    run_dir: Path
    steps: int
    interrupted: bool
    accuracy_before: float
    accuracy_after: float
    seconds: float
    wandb_dir: Path | None
    wandb_url: str | None


def train(config: JobConfig, progress: Progress, replace: bool = False) -> Outcome:
    """Run a job to its end. Whatever it raises, wandb is closed, actors are gone and the report shows what there was.

    Raises:
        RunExistsError: the run directory holds a run and `replace` is off.
        RlsysError: whatever stopped the job, as one readable cause.
        KeyboardInterrupt: interrupted where there was no step to finish, or twice.
    """
    started = time.monotonic()
    losses.resolve(config.rl.loss.name, config.rl.loss.params)  # wrong parameters are refused before any work
    run_dir = new_run_dir(config, replace)
    interrupts = Interrupts(progress.note)
    tracker = Tracker(run_dir, config.tracking, config.run.name, config.model_dump(mode="json"), note=progress.note)
    observer = JobObserver(config, tracker, progress)
    try:
        # Watched again once Ray is up: it puts its own handler of SIGTERM in place, which aborts the process.
        with interrupts.watched(), tracker, cluster(config.cluster) as where, interrupts.watched():
            progress.note(f"rlsys: run {config.run.name!r} on {where}, writing to {run_dir}")
            refuse_shortfall(config)
            with actors(config) as cast:
                steps = _run(config, cast, observer, tracker, interrupts, progress, run_dir)
    finally:
        write_report(run_dir)
    return Outcome(
        run_dir=run_dir,
        steps=steps,
        interrupted=interrupts.requested,
        accuracy_before=observer.accuracies.get(0, float("nan")),
        accuracy_after=observer.accuracies.get(steps, float("nan")),
        seconds=time.monotonic() - started,
        wandb_dir=tracker.wandb_dir,
        wandb_url=tracker.wandb_url,
    )


def new_run_dir(config: JobConfig, replace: bool) -> Path:
    """The run directory, made or emptied.

    Raises:
        RunExistsError: it holds a run and `replace` is off, or files that are no run.
        ConfigError: it cannot be written.
    """
    run_dir = config.run_dir
    try:
        return _emptied(run_dir, replace)
    except OSError as error:
        raise ConfigError(
            f"run.dir {config.run.dir!r}: the run directory {run_dir} cannot be made or written: {error.strerror}"
        ) from error


def _emptied(run_dir: Path, replace: bool) -> Path:
    if run_dir.exists() and any(run_dir.iterdir()):
        if not replace:
            raise RunExistsError(
                f"{run_dir} already holds a run. Give this one another name (run.name=...), or replace the old one "
                "with --replace"
            )
        if not (run_dir / "config.yaml").is_file():
            raise RunExistsError(
                f"{run_dir} holds files but no run of rlsys (no config.yaml), so --replace leaves it alone"
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=run_dir).close()  # a directory that exists may still refuse to be written
    return run_dir


@dataclass
class Cast:
    """The actors of a job."""

    learner: Any
    samplers: list[Any]
    sampler_names: list[str]
    graders: Any
    advantages: Any


@contextmanager
def actors(config: JobConfig) -> Iterator[Cast]:
    """Every actor of the job; gone when the block ends, engines first."""
    learner, sampler = config.learner, config.sampler
    cast = Cast(
        learner=ray.remote(LearnerActor)
        .options(
            num_cpus=learner.num_cpus,
            num_gpus=learner.num_gpus,
            max_concurrency=2,
            runtime_env=threads_env(learner.threads),
        )
        .remote(config),
        samplers=[],
        sampler_names=[f"sampler {i}" for i in range(sampler.num_workers)],
        graders=ray.remote(RewardActor).options(**LIGHT).remote(config),
        advantages=ray.remote(GroupAdvantageActor).options(**LIGHT).remote(config.rl.advantages),
    )
    for i in range(sampler.num_workers):
        options = ray.remote(SamplerActor).options(
            num_cpus=sampler.num_cpus,
            num_gpus=sampler.num_gpus,
            max_concurrency=1000,
            runtime_env=threads_env(sampler.threads),
        )
        cast.samplers.append(options.remote(config, i))
    try:
        yield cast
    finally:
        stopping = [actor.stop.remote() for actor in (*cast.samplers, cast.graders)]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
        for actor in (cast.learner, *cast.samplers, cast.graders, cast.advantages):
            ray.kill(actor)


def _run(
    config: JobConfig,
    cast: Cast,
    observer: JobObserver,
    tracker: Tracker,
    interrupts: Interrupts,
    progress: Progress,
    run_dir: Path,
) -> int:
    for sampler in cast.samplers:
        sampler.preload.remote()  # imports while the base is being made
    base = _make_base(config, cast, observer, progress) if config.model.make else config.model.path
    with progress.stage("starting engines", None):
        _start(config, cast, base)
    observer.graders = ClusterGraders(cast.graders, config)
    stages = Stages(
        samplers=ClusterSamplers(cast.samplers, cast.sampler_names, config),
        graders=observer.graders,
        advantages=ClusterAdvantages(cast.advantages, config),
        learner=ClusterLearner(cast.learner, config),
    )
    epochs = Epochs(config.task.train_problems, config.rl.problems_per_step, config.run.seed)
    held_out = np.arange(config.task.eval_problems)
    with progress.stage("reinforcement learning", config.rl.steps), interrupts.between_steps() as should_stop:
        steps = loop.run(config, stages, epochs, held_out, observer, should_stop)
    limit = config.run.stage_timeout_s
    if config.model.make:
        unpack_folder(wait(base, limit, "learner: the base"), run_dir / "base")
    unpack_folder(wait(cast.learner.adapter_folder.remote(), limit, "learner: saving the adapter"), run_dir / "adapter")
    tracker.adapter(run_dir / "adapter")
    return steps


def _make_base(config: JobConfig, cast: Cast, observer: JobObserver, progress: Progress) -> ray.ObjectRef:
    """Make the base in the learner, showing its figures as they come; returns a reference to the packed folder."""
    made, facts = cast.learner.make_base.options(num_returns=2).remote()
    seen, moved = 0, time.monotonic()
    assert config.model.make
    with progress.stage("supervised: making the base", config.model.make.supervised.max_steps):
        while True:
            done, _ = ray.wait([facts], timeout=POLL_S)
            news = wait(
                cast.learner.supervised_since.remote(seen), config.run.stage_timeout_s, "learner: progress of the base"
            )
            observer.on_supervised(news)
            if done:
                wait(facts, config.run.stage_timeout_s, "learner: making the base")
                return made
            if news:
                seen, moved = seen + len(news), time.monotonic()
            elif time.monotonic() - moved > config.run.start_timeout_s:
                raise StalledError(f"learner: making the base: no step within {config.run.start_timeout_s:.0f} s")


def _start(config: JobConfig, cast: Cast, base: Any) -> None:
    """Load the base everywhere, and have every sampler prove that adapters reach its forward pass."""
    limit = config.run.start_timeout_s
    wait(cast.graders.start.remote(base), limit, "rewards: starting")
    train, held_out = (cast.graders.problems.remote(split) for split in ("train", "eval"))
    starting = [cast.learner.start.remote(base, train)]
    starting += [sampler.start.remote(base, train, held_out) for sampler in cast.samplers]
    wait_all(starting, limit, ["learner: loading the base", *(f"{name}: starting vLLM" for name in cast.sampler_names)])
    probe = cast.learner.probe.remote()
    wait_all(
        [sampler.prove.remote(probe, config.max_canary_diff) for sampler in cast.samplers],
        limit,
        [f"{name}: proving that adapters reach its forward pass" for name in cast.sampler_names],
    )


class JobObserver:
    """Takes what the loop reports to tracker and progress."""

    def __init__(self, config: JobConfig, tracker: Tracker, progress: Progress) -> None:
        self.config, self.tracker, self.progress = config, tracker, progress
        self.accuracies: dict[int, float] = {}
        self.graders: ClusterGraders  # set once the actors are up; nothing is observed before

    def on_supervised(self, news: list[dict[str, float]]) -> None:
        for figures in news:
            step = int(figures["sft/step"])
            self.tracker.log(step, {name: value for name, value in figures.items() if name != "sft/step"})
        if news:
            last = news[-1]
            accuracy = next((new["sft/gate_accuracy"] for new in reversed(news) if "sft/gate_accuracy" in new), None)
            self.progress.update(
                int(last["sft/step"]), loss=last["sft/loss"], tokens_per_s=last["sft/tokens_per_s"], accuracy=accuracy
            )

    def on_step(self, step: int, facts: Facts, rollouts: Made, rewards: Made) -> None:
        self.tracker.log(step, facts)
        self._show("train", "train", step, rollouts, rewards, self.config.tracking.rollouts_per_step)
        self.progress.update(step, reward=facts["reward/mean"], tokens_per_s=facts["sampler/tokens_per_s"])

    def on_eval(self, step: int, facts: Facts, rollouts: Made, rewards: Made) -> None:
        self.tracker.log(step, facts)
        self.accuracies[step] = facts["eval/accuracy"]
        self.progress.update(step, accuracy=facts["eval/accuracy"])
        if step in (0, self.config.rl.steps):
            phase = "before" if step == 0 else "after"
            self._show("eval", phase, step, rollouts, rewards, EVAL_ROWS)

    def _show(self, split: str, phase: Any, step: int, rollouts: Made, rewards: Made, rows: int) -> None:
        if rows:
            shown = self.graders.show(split, rollouts, rewards, rows)
            self.tracker.rollouts(step, [RolloutRow(step=step, phase=phase, **asdict(row)) for row in shown])


EVAL_ROWS = 12  # completions of the held-out problems in the report, before and after
