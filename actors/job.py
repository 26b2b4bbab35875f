"""One training job from configuration to report: starts the actors, runs the loop, and cleans up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import ray

from actors.cluster.column_refs import BaseRef
from actors.cluster.processors import refuse_absent_cores
from actors.cluster.ray_cluster import cluster, refuse_other_builds
from actors.cluster.threads import with_chosen_threads
from actors.control import Control
from actors.faults.actor_logs import Failures
from actors.faults.interrupts import Interrupts
from actors.forking.job_server import ForkServer
from actors.forking.model_check import check_job
from actors.forking.servers import ForkServers, fork_servers
from actors.job_actors import PolicyActors, advantage_actors, job_actors
from actors.job_observer import JobObserver
from actors.stages.learner_group import LearnerGroup
from actors.stages.restarting_actors import GraderActors
from rlsys import async_loop, loop, losses
from rlsys.architectures.support import refuse_unsupported_job
from rlsys.config import JobConfig, ModelSection
from rlsys.config.relative_paths import resolve_paths
from rlsys.data.problems import Epochs
from rlsys.errors import RlsysError, RunExistsError, StorageError
from rlsys.learner.checkpoint_files import CONFIG, MANIFEST, WEIGHTS
from rlsys.protocols import Ref, Stages
from rlsys.run_state.jsonl import ERRORS, read_metrics
from rlsys.run_state.ledger import Ledger
from rlsys.run_state.run_dir import RunStore
from rlsys.run_state.saved_rollouts import delete_after
from rlsys.tracking.progress import Progress
from rlsys.tracking.tracker import Tracker
from rlsys.utils.atomic_files import refusal
from rlsys.utils.env_variables import env_variable
from rlsys.utils.free_cores import Cores, sample_cores
from rlsys.utils.packed_folder import pack_folder
from rlsys.utils.text_files import first_line


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


def train(
    config: JobConfig,
    progress: Progress,
    fresh: bool = False,
    server: ForkServer | None = None,
    check: Callable[[], tuple[str, ...]] | None = None,
    sample: Callable[[], Cores] = sample_cores,
) -> Outcome:
    """Start a run or resume it. Whatever this raises, wandb is closed, actors are gone, and adapter and report are
    those of the last finished step. `server`: forks the job's processes where Ray starts here. `check`: `check_job`,
    where it has begun already. `sample`: measures the cores that are free for the run.

    Raises:
        RunExistsError: the run directory holds something else, or another driver uses it.
        RlsysError: the error that stopped the job.
        KeyboardInterrupt: interrupted before the first step, or twice.
    """
    started = time.monotonic()
    losses.resolve(config.rl.loss.name, config.rl.loss.params)  # wrong parameters are refused before any work
    refuse_other_builds(config.cluster, config.sampler_device, config.learner.device)
    refuse_unsupported_job(config)
    refuse_absent_cores(config.cluster.address, config.learner, config.sampler)
    for note in check() if check else check_job(config):
        progress.note(f"rlsys: {note}")
    complete = partial(with_chosen_threads, note=progress.note, sample=sample)
    with RunStore.open(config, fresh, progress.note, complete) as store:
        config = resolve_paths(store.config)  # which has the run's own date
        if store.finished:
            return _outcome_of_finished(store, progress)
        delete_after(store.run_dir, -1 if store.resume is None else store.resume.step)
        failures = Failures(store.run_dir / ERRORS)
        interrupts = Interrupts(progress.note)
        tracker = _tracker(store.config, store, progress)
        with (
            _results(store, failures, progress.note),
            interrupts.watched(),
            tracker,
            cluster(config.cluster) as where,
            # Again once Ray is up: it installs its own handler of SIGTERM, which aborts the process.
            interrupts.watched(),
        ):
            _announce(config.run.name, store, where, progress)
            servers = fork_servers(server, config, progress.note)
            steps, accuracies = _run(config, store, failures, tracker, interrupts, progress, servers)
        return Outcome(
            run_dir=store.run_dir,
            steps=steps,
            interrupted=interrupts.requested,
            accuracy_before=accuracies.get(0, float("nan")),
            accuracy_after=accuracies.get(steps, float("nan")),
            seconds=time.monotonic() - started,
            wandb_dir=tracker.wandb_dir,
            wandb_url=tracker.wandb_url,
        )


@contextmanager
def _results(store: RunStore, failures: Failures, note: Callable[[str], None]) -> Iterator[None]:
    """Write adapter and report after an error of the block, which writes them itself at its end; an error here is only
    noted.

    Raises:
        StorageError: the disk is full or refuses writes.
        RlsysError: the block's error, with the first error of any actor.
    """
    try:
        yield
    except BaseException as error:
        reported = error
        if isinstance(error, OSError) and (refused := refusal(error, store.run_dir)) is not None:
            reported = StorageError(refused)
        elif isinstance(error, RlsysError):
            reported = type(error)(failures.report(error))
        results: dict[str, Callable[[RunStore], None]] = {"adapter": save_adapter, "report": _write_report}
        for what, write in results.items():
            try:
                write(store)
            except Exception as failure:
                note(f"{store.run_dir}: the {what} cannot be written: {first_line(failure)}")
        if reported is error:
            raise
        raise reported from error


def save_adapter(store: RunStore) -> None:
    """Copy the adapter of the newest checkpoint to `adapter/`."""
    latest = store.latest()
    if latest is not None:
        store.put("adapter", {name: latest.files[name] for name in (CONFIG, WEIGHTS, MANIFEST)})


def _run(
    config: JobConfig,
    store: RunStore,
    failures: Failures,
    tracker: Tracker,
    interrupts: Interrupts,
    progress: Progress,
    servers: ForkServers,
) -> tuple[int, dict[int, float]]:
    """From the base to the last checkpoint. Returns the last step, and the accuracy of each evaluation by step."""
    with ExitStack() as stack:
        # The actors and the ledger exist before anything is asked for or sampled again.
        handlers: dict[str, Callable[[int | None], str]] = {
            "scale": lambda wanted: actors.policy.samplers.membership.resize(wanted or 0),
            "stop": lambda _: interrupts.request(),
        }
        control = Control(config.run.name, handlers)
        stack.callback(control.close)
        actors = stack.enter_context(
            job_actors(
                config,
                store,
                failures,
                progress.note,
                between=control.listen,
                resampled=lambda problems: ledger.resampled(problems),
                servers=servers,
            )
        )
        policy = actors.policy
        observer = JobObserver(config, tracker, progress, failures, _accuracies(store), policy.graders, actors.pids)
        base = _base(config.model, policy.learner, store, observer, progress)
        with progress.stage("starting engines", None):
            policy.begin(base)
            policy.graders.start(base)
            counts = _task_facts(policy.graders, store, observer)
            policy.start(base)
        advantages = stack.enter_context(advantage_actors(config, failures, progress.note, servers))
        epochs = Epochs(counts["train"], config.rl.problems_per_step, config.run.seed)
        ledger = Ledger(epochs) if store.resume is None else Ledger.from_bytes(store.resume.ledger, epochs)
        stages = Stages(policy.samplers, policy.graders, advantages, policy.learner, actors.checkpointer)
        held_out = np.arange(counts["eval"])
        run = loop.run if config.overlap.max_policy_lag is None else async_loop.run
        with progress.stage("reinforcement learning", config.rl.steps), interrupts.between_steps() as requested:

            def should_stop() -> bool:
                control.listen()
                return requested()

            steps = run(config, stages, ledger, held_out, observer, should_stop)
        actors.checkpointer.flush()
        _close(store, tracker, policy)
        return steps, observer.accuracies


def _close(store: RunStore, tracker: Tracker, policy: PolicyActors) -> None:
    """Write the results of a run. Engines, graders and wandb end meanwhile, each in its process or thread; the adapter
    is on disk before."""
    save_adapter(store)
    policy.ask_to_stop()
    tracker.adapter(store.run_dir / "adapter")
    tracker.finish()
    _write_report(store)


def _write_report(store: RunStore) -> None:
    from rlsys.report.page import write_report  # imports jinja2, which a start does not wait for

    write_report(store.run_dir)


def _base(
    model: ModelSection, learner: LearnerGroup, store: RunStore, observer: JobObserver, progress: Progress
) -> BaseRef:
    """A folder or hub name, or a reference to the packed folder of the base that this run trained from scratch."""
    make = model.make
    if make is None:
        assert model.path is not None
        return model.path
    if store.base is None:
        with progress.stage("supervised: making the base", make.supervised.max_steps):
            store.put("base", learner.make_base(observer.on_supervised))
    assert store.base is not None
    return Ref(ray.put(pack_folder(store.base)))


def _task_facts(graders: GraderActors, store: RunStore, observer: JobObserver) -> dict[str, int]:
    """Number of problems of each split; noted in the run directory, and compared on resume, before the run goes on.

    Raises:
        RunExistsError: the run began with other problems.
    """
    metrics, digest = graders.metrics(), graders.digest()
    before = store.info.get("problems")
    if before not in (None, digest) and store.resume is not None:
        raise RunExistsError(
            f"{store.run_dir}: the training problems are not those that this run began with (hash {digest}, then "
            f"{before}): the data, the prompt section or the tokenizer has changed. Give this job another run.name, or "
            "start over with --fresh"
        )
    store.note(problems=digest, train_problems=int(metrics["task/train_problems"]))
    graders.write_problems(str(store.run_dir.absolute()))
    if store.resume is None:
        observer.on_task(metrics)
    return {split: int(metrics[f"task/{split}_problems"]) for split in ("train", "eval")}


def _tracker(config: JobConfig, store: RunStore, progress: Progress) -> Tracker:
    return Tracker(
        store.run_dir,
        config.tracking,
        config.run.name,
        config.model_dump(mode="json"),
        note=progress.note,
        wandb_id=store.info["wandb_id"],
        resume_from=None if store.resume is None else store.resume.step,
        keep_supervised=store.base is not None,
    )


def _announce(run: str, store: RunStore, where: str, progress: Progress) -> None:
    """Tell the user, `rlsys scale` and `rlsys stop` where the run is."""
    after = "" if store.resume is None else f", resuming after step {store.resume.step}"
    progress.note(f"rlsys: run {run!r} on {where}, writing to {store.run_dir}{after}")
    store.note(
        cluster=ray.get_runtime_context().gcs_address, auth_mode=env_variable("RAY_AUTH_MODE") or "", pid=os.getpid()
    )


def _accuracies(store: RunStore) -> dict[int, float]:
    """Accuracy of each evaluation up to the last checkpoint, by step."""
    done = -1 if store.resume is None else store.resume.step
    lines = read_metrics(store.run_dir)
    return {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line and line["step"] <= done}


def _outcome_of_finished(store: RunStore, progress: Progress) -> Outcome:
    assert store.resume is not None
    steps, accuracies = store.resume.step, _accuracies(store)
    progress.note(
        f"{store.run_dir}: this run has finished all of its {steps} steps; raise rl.steps to continue it, or start "
        "over with --fresh"
    )
    save_adapter(store)
    _write_report(store)
    return Outcome(
        run_dir=store.run_dir,
        steps=steps,
        interrupted=False,
        accuracy_before=accuracies.get(0, float("nan")),
        accuracy_after=accuracies.get(steps, float("nan")),
        seconds=0.0,
        wandb_dir=None,
        wandb_url=None,
    )
