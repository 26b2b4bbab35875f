"""Driver cost per group, with 64 sampler actors, 4,096 groups in flight, and answers replayed from a real run.

    python -m benchmarks.data_plane [--recorded RUN_DIR] [--samplers 64] [--groups 4096] [--repeats 5] [--trace]

Without --recorded the quickstart runs for two steps first, and its saved rollouts (steps/*.npz) are replayed.

Real: the sampler pool, the synchronous and the overlapped loop, the reward, advantage and learner stages with their
watchdogs, the advantage actor, the reward actor with its saving of steps, ledger, checkpoints, metrics, and everything
else that the job's observer writes. Replaced (benchmarks/replaying.py) or left out: engines, grader processes and
texts, the learner's model; completions in the rollouts table; wandb.

A turn of each side is `--steps` steps of the loop with `--groups` groups each. Measured is the CPU time of the driver
process per group, including Ray's threads. Also reported: bytes over all TCP connections of the driver, bytes that it
deserialised, and its memory after every step. --trace: memory without what is free, and what Python holds of it; times
mean nothing then. "10x longer" repeats every completion ten times end to end.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console

from actors.cluster.placement import Placement, Slot
from actors.cluster.ray_cluster import cluster
from actors.control import Control
from actors.faults.actor_logs import Failures
from actors.forking.servers import NO_SERVERS
from actors.job import train
from actors.job_actors import JobActors, PolicyActors
from actors.job_observer import JobObserver
from actors.stages.checkpointer import BackgroundCheckpointer
from actors.stages.learner_group import LearnerGroup, LearnerInit
from actors.stages.restarting_actors import AdvantageActors, GraderActors, RestartingActor
from actors.stages.sampler_pool import membership
from actors.stages.sampler_pool.membership import SamplerInit
from actors.stages.sampler_pool.pool import SamplerPool
from benchmarks.metering import Meter, Peaks, growth
from benchmarks.replaying import WATCH, Recording, ReplayingLearner, ReplayingRewards, ReplayingSampler
from benchmarks.rows import Row, Target, by_turns, finish
from rlsys import async_loop, loop
from rlsys.config import JobConfig, load_config
from rlsys.data.problems import Epochs
from rlsys.metrics import Metrics
from rlsys.protocols import Ref, Stages, TrainedStep
from rlsys.run_state.ledger import Ledger
from rlsys.run_state.run_dir import RunStore
from rlsys.run_state.saved_rollouts import load_step, recorded_steps
from rlsys.tracking.progress import Progress
from rlsys.tracking.tracker import Tracker

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
LIMIT = "limit"
SAMPLES = 8
SEQUENCES = 512  # of an engine: 64 samplers hold 4,096 groups of 8 between them
PACE_S = 0.005  # per token of a call's longest completion
LEARN_S = 0.2  # of a piece
ADAPTER_BYTES = 2**20
HELD_OUT = 8  # problems of the evaluation that every run ends with
WARM = 1  # turns of each side before what memory grows by is counted

# side -> overlap.max_policy_lag, and how often each completion is repeated end to end
SIDES: dict[str, tuple[int | None, int]] = {
    "sync": (None, 1),
    "overlapped": (1, 1),
    "overlapped, 10x longer": (1, 10),
}


class ReplayedGraders(GraderActors):
    def __init__(self, config: JobConfig, failures: Failures, note: Callable[[str], None]) -> None:
        remote = ray.remote(concurrency_groups={"watch": 1})(ReplayingRewards).options(
            **NO_SERVERS.driver_node_options()
        )
        RestartingActor.__init__(
            self,
            "rewards",
            lambda: remote.remote(config),
            config.watchdog,
            config.cluster.max_restarts,
            failures,
            note,
        )
        self.config, self.servers = config, NO_SERVERS
        self.base = None
        self.reported_failures = set()


class ReplayedLearner(LearnerGroup):
    def launch(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.lives += 1
        remote = ray.remote(concurrency_groups={WATCH: 1})(ReplayingLearner)
        given = self.config.model.dtype, ADAPTER_BYTES, LEARN_S
        self.ranks = [remote.options(**slot.ray_options()).remote(*given) for slot in slots]


class Watching(JobObserver):
    """Observer of the job that reads the meter after every step."""

    meter: Meter
    tokens: float = 0.0

    def on_step(self, step: int, metrics: Metrics, trained: TrainedStep) -> None:
        super().on_step(step, metrics, trained)
        self.tokens += metrics["sampler/completion_tokens"]
        self.meter.readings.append(self.meter.read())


@dataclass
class Bench:
    """A job whose loop is run for some steps at a time."""

    config: JobConfig
    cast: JobActors
    stages: Stages
    ledger: Ledger
    observer: Watching
    spent: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    longer: int = 1

    def turn(self, side: str, lag: int | None, longer: int, steps: int) -> float:
        """So many steps; milliseconds of the driver's CPU time per group."""
        self._set(longer)
        until = self.stages.checkpointer.done + steps
        overlapping = self.config.overlap.model_copy(update={"max_policy_lag": lag})
        of_rl = self.config.rl.model_copy(update={"steps": until})
        config = self.config.model_copy(update={"overlap": overlapping, "rl": of_rl})
        self.cast.policy.samplers.dispatcher.overlap = overlapping
        run = loop.run if lag is None else async_loop.run
        before, tokens = self.observer.meter.read(), self.observer.tokens
        assert run(config, self.stages, self.ledger, np.arange(HELD_OUT), self.observer) == until
        spent = self.observer.meter.read().since(before) | {"tokens": self.observer.tokens - tokens}
        groups = steps * config.rl.problems_per_step
        per_group = {name: amount / groups for name, amount in spent.items()}
        self.spent.setdefault(side, []).append(per_group)
        return 1000 * per_group["cpu_s"]

    def _set(self, longer: int) -> None:
        if longer != self.longer:
            ray.get([member.actor.set.remote(longer, PACE_S) for member in self.cast.policy.samplers.members])
            self.longer = longer


def _refuse_renewal() -> Any:
    raise RuntimeError("an object of this benchmark was lost; run it again")


@contextmanager
def bench(config: JobConfig, recording: Recording) -> Iterator[Bench]:
    """The actors of a job, as started by `actors.job_actors.job_actors`, with replay actors."""
    progress = Progress(Console(stderr=True, highlight=False))
    with ExitStack() as ending:
        store = ending.enter_context(RunStore.open(config, note=progress.note))
        failures = Failures()
        tracker = ending.enter_context(
            Tracker(store.run_dir, config.tracking, config.run.name, config.model_dump(mode="json"))
        )
        ending.enter_context(cluster(config.cluster))
        placement = Placement(config, progress.note)
        ending.callback(placement.release)
        rank_slots, sampler_slots = placement.reserve()
        learner = ReplayedLearner(config, store, failures, progress.note)
        keeper = BackgroundCheckpointer(config.rl.steps, config.watchdog, store, learner)
        ending.callback(keeper.close)
        ending.callback(learner.close)
        ending.callback(keeper.finish)
        learner.launch(rank_slots)
        graders = ReplayedGraders(config, failures, progress.note)
        ending.callback(graders.close)
        advantages = AdvantageActors(config.rl, config.watchdog, config.cluster.max_restarts, failures, progress.note)
        ending.callback(advantages.close)
        ledger = Ledger(Epochs(config.rl.problems_per_step, config.rl.problems_per_step, config.run.seed))
        control = Control(config.run.name, {})
        ending.callback(control.close)
        # The pool starts the class of this name, which its module imports; the replaying one only has its methods.
        membership.SamplerActor = ReplayingSampler  # type: ignore[assignment, attr-defined]
        samplers = SamplerPool(
            config, placement, failures, progress.note, _refuse_renewal, control.listen, ledger.resampled
        )
        ending.callback(samplers.close)
        samplers.membership.launch(sampler_slots)
        base, nothing = Ref[Any](ray.put(recording)), Ref[Any](None)
        graders.start(base)
        samplers.membership.begin(base)
        learner.start(LearnerInit(base, nothing))
        samplers.membership.start(SamplerInit(base, nothing, nothing, learner.probe()))
        ray.get([member.actor.set.remote(1, PACE_S) for member in samplers.members])
        cast = JobActors(PolicyActors(learner, samplers, graders), keeper)
        observer = Watching(config, tracker, progress, failures, {}, graders, cast.pids)
        observer.meter = Meter()
        stages = Stages(samplers, graders, advantages, learner, keeper)
        keeper.done = max(keeper.done, 0)  # no evaluation before the first step
        ending.enter_context(progress.stage("replaying", config.rl.steps))
        yield Bench(config, cast, stages, ledger, observer)


def recorded(run_dir: Path) -> Recording:
    """The last recorded step of a run."""
    found = load_step(run_dir, recorded_steps(run_dir)[-1])
    return Recording(found.rollouts, found.rewards)


def quickstart(folder: Path) -> Path:
    """Run the quickstart for two steps; returns the run directory."""
    overrides = [f"run.dir={folder}", "rl.steps=2", "eval.every_steps=0", "tracking.wandb=disabled"]
    config = load_config(CONFIG, overrides)
    train(config, Progress(Console(stderr=True, highlight=False)))
    return config.run_dir


def job(folder: Path, samplers: int, groups: int, longest: int) -> JobConfig:
    return load_config(
        CONFIG,
        [
            "run.name=data-plane",
            f"run.dir={folder}",
            "cluster.num_cpus=2",
            "cluster.object_store_gb=2",
            "learner.num_cpus=0.01",
            f"sampler.num_workers={samplers}",
            "sampler.num_cpus=0.01",
            f"sampler.max_num_seqs={SEQUENCES}",
            f"rl.problems_per_step={groups}",
            f"rl.samples_per_problem={SAMPLES}",
            f"rl.sampling.max_tokens={longest}",
            "rl.steps=1000000",
            "eval.every_steps=0",
            "tracking.wandb=disabled",
            "tracking.rollouts_per_step=0",
            "tracking.rollout_steps=1",
        ],
    )


def profile(work: Callable[[], Any]) -> list[str]:
    """The functions in which the loop's thread spends most of its time, without their callees."""
    profiler = cProfile.Profile(time.thread_time)
    profiler.runcall(work)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]  # typeshed leaves it out
    heaviest = sorted(stats.items(), key=lambda one: -one[1][2])[:12]
    return [
        f"{own:.3f} s own, {whole:.3f} s with callees, {calls} calls: {Path(file).name}:{line} {name}"
        for (file, line, name), (_, calls, own, whole, _) in heaviest
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recorded", type=Path)
    parser.add_argument("--samplers", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.trace:
        tracemalloc.start()
    with tempfile.TemporaryDirectory(prefix="rlsys-plane-") as scratch:
        recording = recorded(arguments.recorded or quickstart(Path(scratch)))
        lengths = recording.rollouts.lengths
        config = job(Path(scratch), arguments.samplers, arguments.groups, int(lengths.max()))
        with bench(config, recording) as bed:
            row = measured(bed, arguments, lengths)
    finish(row, arguments.out)


def measured(bed: Bench, arguments: argparse.Namespace, lengths: Any) -> Row:
    pool, meter = bed.cast.policy.samplers, bed.observer.meter

    def in_flight() -> dict[str, int]:
        groups = sum(member.held for member in pool.members) // SAMPLES
        return {"groups_in_flight": groups, "calls_in_flight": len(pool.dispatcher.in_flight)}

    with Peaks(in_flight) as peaks:
        found = by_turns(
            {name: partial(bed.turn, name, *how, arguments.steps) for name, how in SIDES.items()}, arguments.repeats
        )
    settled = meter.readings[WARM * len(SIDES) * arguments.steps :]
    per_group = {
        name: {key: float(np.median([turn[key] for turn in turns])) for key in turns[0]}
        for name, turns in bed.spent.items()
    }
    profiles = {
        name: profile(partial(bed.turn, "profile", lag, 1, arguments.steps))
        for name, (lag, longer) in SIDES.items()
        if longer == 1
    }
    return Row(
        name="data_plane",
        title=f"driver, {arguments.samplers} sampler actors, {arguments.groups:,} groups in flight",
        command="python -m benchmarks.data_plane",
        unit="ms of driver CPU per group",
        sides={**found, LIMIT: [1.0] * arguments.repeats},
        targets=[Target(name, LIMIT, 1.0, "<=") for name in SIDES],
        equal={
            "samplers": arguments.samplers,
            "groups_per_step": arguments.groups,
            "completions_per_group": SAMPLES,
            "recorded_tokens_per_completion": float(lengths.mean()),
            "steps_per_turn": arguments.steps,
            "checkpoint_bytes_per_step": 3 * ADAPTER_BYTES,
        },
        more={
            **peaks.found,
            "per_group": per_group,
            "memory": growth(settled, arguments.groups),
            "profile": profiles,
        },
    )


if __name__ == "__main__":
    main()
