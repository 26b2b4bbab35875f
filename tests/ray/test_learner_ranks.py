"""Several learner ranks in one job: killed, and stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import psutil
import pytest

from actors import job as jobs
from rlsys.config import JobConfig
from rlsys.errors import ClusterError, StalledError
from rlsys.run_state.jsonl import read_metrics
from rlsys.tracking.progress import Progress
from tests.ray.conftest import UNDISTURBED_STEPS as STEPS
from tests.ray.test_recovery import actors_of, killing, ledger_of, steps
from tests.waiting import FAR_S

Job = Callable[..., JobConfig]
TWO = ("learner.num_workers=2", "learner.num_cpus=0.5")


@pytest.mark.soak
def test_two_ranks_with_a_shared_base_and_two_samplers_survive_the_death_of_a_rank(ray_cluster: str, job: Job) -> None:
    config = job(f"rl.steps={STEPS}", *TWO, "learner.shard_base=true", "sampler.num_workers=2")
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append  # type: ignore[method-assign,assignment]
    with killing(config, lambda: actors_of("LearnerActor")[1:]) as killed:
        jobs.train(config, progress)
    assert killed and any("the learner is back, after step" in note for note in notes), notes
    assert steps(config) == list(range(1, STEPS + 1))
    ledger_of(config).audit()
    lines = [line for line in read_metrics(config.run_dir) if "reward/mean" in line]
    assert [line["policy/version"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["policy/logprob_diff_max"] < 1e-3 for line in lines), "both ranks' tokens, against both samplers"


@pytest.mark.soak
def test_a_rank_that_stands_still_stops_the_run_and_is_named(ray_cluster: str, job: Job) -> None:
    config = job("rl.steps=100000", *TWO, "watchdog.stages.learn=30", "watchdog.stages.sync=30")
    stopped: list[float] = []

    def victim() -> list[psutil.Process]:
        rank = actors_of("LearnerActor")[1]
        rank.send_signal(signal.SIGSTOP)
        stopped.append(time.monotonic())
        return [psutil.Popen(["sleep", f"{FAR_S:.0f}"])]  # what `killing` kills instead

    with killing(config, victim), pytest.raises(StalledError) as caught:
        jobs.train(config, Progress())
    text = str(caught.value)
    print(f"after {time.monotonic() - stopped[0]:.1f} s:\n{text}")
    assert "no progress for 30 s" in text and "watchdog." in text
    assert text.splitlines()[1].startswith("  waiting for learner rank"), "who is stuck comes first"
    assert "has not answered any progress request" in text.splitlines()[1]


def test_more_ranks_than_there_is_room_for_are_refused_at_once(ray_cluster: str, job: Job) -> None:
    with pytest.raises(ClusterError, match=r"9\.5 CPU needed, 4 found, 5\.5 too few: learner\.num_workers 9 x"):
        jobs.train(job("learner.num_workers=9", f"watchdog.stages.start={FAR_S}"), Progress())


def test_a_place_that_no_single_node_has_is_refused_at_once(ray_cluster: str, job: Job) -> None:
    waits = f"watchdog.stages.start={FAR_S}"  # for whatever is not refused
    with pytest.raises(ClusterError, match=r"placement STRICT_SPREAD needs 2 nodes, found 1; use SPREAD"):
        jobs.train(job(*TWO, "learner.placement=STRICT_SPREAD", waits), Progress())
    with pytest.raises(ClusterError, match=r"found no node '10\.9\.9\.9'; nodes are"):
        jobs.train(job("sampler.nodes=[10.9.9.9]", waits), Progress())
