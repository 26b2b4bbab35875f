"""Actors are killed in mid-run: the run goes on, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors import job as jobs
from rlsys.config import JobConfig, parse_config
from rlsys.data.problems import Epochs
from rlsys.errors import ActorDiedError, ClusterError
from rlsys.run_state.jsonl import read_metrics
from rlsys.run_state.ledger import Ledger
from rlsys.run_state.resume import newest
from rlsys.run_state.run_dir import RunStore
from rlsys.tracking.progress import Progress
from tests.ray.conftest import JOB
from tests.ray.conftest import UNDISTURBED_STEPS as STEPS
from tests.waiting import cpu_of, family, size_of, until

Job = Callable[..., JobConfig]


def weights(config: JobConfig) -> bytes:
    return (config.run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def steps(config: JobConfig) -> list[int]:
    return [line["step"] for line in read_metrics(config.run_dir) if "reward/mean" in line]


def epochs_of(config: JobConfig) -> Epochs:
    assert config.task.train_problems is not None
    return Epochs(config.task.train_problems, config.rl.problems_per_step, config.run.seed)


def ledger_of(config: JobConfig) -> Ledger:
    latest = newest(config.run_dir)
    assert latest is not None
    epochs = epochs_of(config)
    return Ledger.from_bytes(latest.ledger, epochs)


Victim = Callable[[], list[psutil.Process]]


@contextmanager
def killing(config: JobConfig, *plan: Victim) -> Iterator[list[int]]:
    """Kills the first of each kind in turn, each after a step made since the one before; yields their pids."""
    killed: list[int] = []
    over = threading.Event()

    def wait_and_kill() -> None:
        seen = 0
        for victim in plan:
            while not over.is_set():  # the job's own end, which the watchdog sees to
                made = steps(config)[-1:] if (config.run_dir / "metrics.jsonl").is_file() else []
                processes = victim() if made and made[0] > seen else []
                if processes:
                    seen = made[0]
                    processes[0].send_signal(signal.SIGKILL)
                    killed.append(processes[0].pid)
                    break
                time.sleep(0.02)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def on_cluster() -> list[tuple[str, psutil.Process]]:
    """All processes of the tests' cluster with their titles, oldest first: those that Ray started, and what these
    started or forked."""
    raylet = f"--gcs-address={os.environ['RAY_ADDRESS']}"
    nodes = [each for each in psutil.process_iter() if "raylet/raylet" in _title(each) and raylet in _title(each)]
    ours = [each for node in nodes for each in family(node.pid)]
    return [(_title(each), each) for each in sorted(ours, key=lambda process: process.create_time())]


def actors_of(kind: str) -> list[psutil.Process]:
    """Processes of one actor class, oldest first."""
    return [process for title, process in on_cluster() if title.startswith(f"ray::{kind}")]


def engines() -> list[psutil.Process]:
    return [process for title, process in on_cluster() if "EngineCore" in title]


def hosts() -> list[psutil.Process]:
    return [process for title, process in on_cluster() if "rlsys host of sampler 0" in title]


def _title(process: psutil.Process | None) -> str:
    try:
        return " ".join(process.cmdline()) if process else ""
    except psutil.Error:
        return ""


def check_whole(config: JobConfig, undisturbed: JobConfig) -> None:
    assert steps(config) == list(range(1, STEPS + 1)), "no step is missing or doubled"
    ledger = ledger_of(config)
    ledger.audit()
    counts = ledger.counts()
    assert counts["trained"] + counts["filtered"] == STEPS * config.rl.problems_per_step, counts
    epochs = epochs_of(config)
    for step in range(1, STEPS + 1):
        assert np.array_equal(ledger.ids(step), epochs.batch_at(step - 1))
    assert weights(config) == weights(undisturbed), "the final adapter is not the one of an undisturbed run"


@dataclass(frozen=True)
class Disturbed:
    """A run in which the host process of its sampler was killed, and after a further step its learner."""

    config: JobConfig
    killed: list[int]  # pids
    notes: list[str]
    engines: tuple[list[int], list[int]]  # pids before the learner's death and once it was back


@pytest.fixture(scope="module")
def disturbed(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    where = [f"model.path={micro_base}", f"run.dir={tmp_path_factory.mktemp('disturbed')}"]
    config = parse_config(JOB, [*where, f"rl.steps={STEPS}"])
    before: list[int] = []
    after: list[int] = []
    notes: list[str] = []

    def learner() -> list[psutil.Process]:
        before[:] = [process.pid for process in engines()]
        return actors_of("LearnerActor")

    def note(text: str) -> None:
        notes.append(text)
        if "the learner is back" in text:
            after.extend(process.pid for process in engines())

    progress = Progress()
    progress.note = note  # type: ignore[method-assign]
    with killing(config, hosts, learner) as killed:
        jobs.train(config, progress)
    return Disturbed(config, killed, notes, (before, after))


def test_a_killed_host_process_is_named_and_its_sampler_replaced(disturbed: Disturbed) -> None:
    (told,) = [note for note in disturbed.notes if "sampler 0 died and is replaced" in note]
    how = f"sampler 0: its host process {disturbed.killed[0]}, which starts the engine, ended: signal 9 (Killed)"
    assert told.startswith("sampler 0 died and is replaced (1 of ") and told.endswith(how)


def test_a_killed_learner_comes_back_from_its_checkpoint_and_the_samplers_stay(disturbed: Disturbed) -> None:
    before, after = disturbed.engines
    assert len(disturbed.killed) == 2 and after == before and after, "samplers were not restarted"
    assert any("the learner is back, after step" in text for text in disturbed.notes), disturbed.notes


def test_a_run_that_lost_a_host_process_and_its_learner_ends_as_if_nothing_had_happened(
    disturbed: Disturbed, undisturbed: JobConfig
) -> None:
    check_whole(disturbed.config, undisturbed)


@pytest.mark.soak
def test_a_run_whose_actors_are_killed_one_after_the_other_ends_with_the_very_weights_of_an_undisturbed_one(
    job: Job, undisturbed: JobConfig
) -> None:
    config = job(f"rl.steps={STEPS}")
    kinds: list[Victim] = [
        lambda: actors_of("SamplerActor"),
        engines,
        lambda: actors_of("RewardActor"),
        lambda: actors_of("GroupAdvantageActor"),
    ]
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append  # type: ignore[method-assign,assignment]
    with killing(config, *kinds) as killed:
        outcome = jobs.train(config, progress)
    assert len(killed) == len(kinds) and outcome.steps == STEPS
    told = [note for note in notes if "died and is replaced" in note]
    assert [note.split(" died")[0] for note in told] == ["sampler 0", "sampler 0", "rewards", "advantages"], notes
    check_whole(config, undisturbed)


def test_deaths_beyond_the_limit_end_the_run_with_the_first_cause_and_the_last_whole_adapter(job: Job) -> None:
    config = job(f"rl.steps={STEPS}", "cluster.max_restarts=0")
    with (
        killing(config, lambda: actors_of("SamplerActor")) as killed,
        pytest.raises(
            ActorDiedError, match=r"samplers died 1 times.*cluster\.max_restarts is 0\)\nfirst error.*sampler 0"
        ),
    ):
        jobs.train(config, Progress())
    assert killed and weights(config)
    assert (config.run_dir / "errors.log").read_text().count("sampler 0") >= 1


def test_a_run_in_two_parts_equals_one_in_one_part_to_the_bit_and_in_its_figures(
    job: Job, undisturbed: JobConfig
) -> None:
    jobs.train(job("rl.steps=3", "tracking.wandb=offline"), Progress())
    second = job(f"rl.steps={STEPS}", "tracking.wandb=offline")
    assert jobs.train(second, Progress()).steps == STEPS
    check_whole(second, undisturbed)
    timed = ("time", "sampler/tokens_per_s", "row", "system/")
    parts, whole = (
        [
            {name: value for name, value in line.items() if not name.startswith(timed)}
            for line in read_metrics(config.run_dir)
            if "reward/mean" in line
        ]
        for config in (second, undisturbed)
    )
    assert [line for line in parts if line["step"] > 3] == [line for line in whole if line["step"] > 3]
    assert {file.name.split("-")[-1] for file in (second.run_dir / "wandb").glob("**/offline-run-*")} == {
        RunStore.open(second).info["wandb_id"]
    }


def test_samplers_come_and_go_while_a_job_runs(ray_cluster: str, job: Job) -> None:
    config = job("rl.steps=100000")
    metrics = config.run_dir / "metrics.jsonl"
    signs = size_of(metrics), cpu_of(os.getpid())
    asked: list[str] = []
    errors: list[BaseException] = []

    def from_outside() -> None:
        """What `rlsys scale` and `rlsys stop` do, on the driver's own connection."""
        from actors.control import ask

        try:
            until(lambda: metrics.is_file() and len(steps(config)) >= 1, "step 1", *signs)
            asked.append(ask("micro", "scale", 2))
            until(lambda: _workers(config) == 2, "a second sampler", *signs)
            with pytest.raises(ClusterError, match=r"no room|no node"):
                ask("micro", "scale", 50)
            asked.append(ask("micro", "scale", 1))
            until(lambda: _workers(config) == 1, "one sampler", *signs)
            asked.append(ask("micro", "stop", None))
        except BaseException as error:
            errors.append(error)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=from_outside)
    thread.start()
    outcome = jobs.train(config, Progress())
    thread.join()
    assert not errors, errors
    assert outcome.interrupted and asked[0].startswith("1 samplers -> 2") and asked[1].startswith("2 samplers -> 1")
    made = steps(config)
    assert made == list(range(1, len(made) + 1))
    ledger_of(config).audit()


def _workers(config: JobConfig) -> float:
    return [line for line in read_metrics(config.run_dir) if "sampler/workers" in line][-1]["sampler/workers"]
