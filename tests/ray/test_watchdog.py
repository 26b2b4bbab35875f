"""Who waits for whom is said, errors come out as one cause, and slow work is not taken for stuck work."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from actors.faults.actor_calls import wait
from actors.faults.actor_logs import Failures, process_of, tail
from actors.faults.watchdog import Waiting, Watchdog, value, watched, watched_all
from actors.hosting.host_process import HostProcess
from actors.hosting.sampler_body import SamplerBody
from actors.sampler_actor import SamplerActor
from rlsys.config import JobConfig, parse_config
from rlsys.errors import ActorDiedError, ActorFailedError, DataLostError, GradingError, StalledError
from rlsys.rollouts import offsets_of
from rlsys.types import SamplingParams
from tests.ray.conftest import JOB
from tests.ray.small_actors import Loop, Worker
from tests.waiting import FAR_S, slowdown, until, until_gone

TIMES = round(slowdown())  # on a loaded machine all limits here are longer
LIMIT_S = 3.0 * TIMES


@pytest.fixture(scope="module")
def connected(ray_cluster: str) -> Iterator[None]:
    ray.init(address=ray_cluster, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def actor(connected: None) -> Iterator[Callable[..., Any]]:
    """Makes small actors, which end with the test."""
    made: list[Any] = []

    def make(kind: type = Worker, *args: Any, **options: Any) -> Any:
        made.append(ray.remote(kind).options(num_cpus=0, **{"max_concurrency": 2, **options}).remote(*args))
        ray.wait([made[-1].progress.remote()])  # the limits here are shorter than a process takes to start
        return made[-1]

    yield make
    for one in made:
        ray.kill(one)


def test_slow_work_that_moves_is_not_judged_stalled(actor: Callable[..., Any]) -> None:
    worker, began = actor(), time.monotonic()
    assert (
        watched(worker.work.remote(16 * TIMES, 0.5), Watchdog("learn", LIMIT_S), "learner", "step 3", worker)
        == 16 * TIMES
    )
    assert time.monotonic() - began > 2 * LIMIT_S


def test_a_stuck_actor_is_named_with_its_work_its_log_and_the_key_to_raise(actor: Callable[..., Any]) -> None:
    stuck, busy = actor(), actor()
    dog, began = Watchdog("sample", LIMIT_S), time.monotonic()
    waits = [
        Waiting(busy.work.remote(40 * TIMES, 0.25), "sampler 0", "sampling 8 completions of problems 1, 2", busy),
        Waiting(stuck.stick.remote(), "sampler 1", "sampling 8 completions of problems 3, 17, 40", stuck),
    ]
    with pytest.raises(StalledError) as caught:
        watched_all(waits, dog)
    assert LIMIT_S < time.monotonic() - began < 5 * LIMIT_S
    message = str(caught.value)
    assert message.startswith(f"sample: no progress for {LIMIT_S:g} s.")
    assert f"raise watchdog.stages.sample (now {LIMIT_S:g})" in message
    assert re.search(
        r"waiting for sampler 1: sampling 8 completions of problems 3, 17, 40; since \d\d:\d\d:\d\d", message
    )
    assert re.search(r"its progress last changed \d+ s ago: 0", message)
    moved = re.search(r"also waiting for sampler 0: .*its progress last changed (\d+) s ago", message)
    assert moved and int(moved[1]) < LIMIT_S
    assert "log of sampler 1: end of " in message and "  | entering the long sleep" in message


def test_an_actor_that_cannot_even_tell_its_progress_is_named_too(actor: Callable[..., Any]) -> None:
    loop = actor(Loop)
    with pytest.raises(StalledError, match=r"sampler 0: loading version 4; .*has not answered any progress request"):
        watched(loop.stick.remote(), Watchdog("sync", LIMIT_S), "sampler 0", "loading version 4", loop)


def test_without_an_actor_the_limit_counts_from_the_beginning(actor: Callable[..., Any]) -> None:
    worker = actor()
    with pytest.raises(StalledError, match="advantages: centring rewards"):
        watched(worker.work.remote(20 * TIMES, 0.25), Watchdog("advantage", LIMIT_S), "advantages", "centring rewards")


def test_ranks_that_wait_for_one_another_move_together(actor: Callable[..., Any]) -> None:
    """A rank that is done with its share stands still in the sum until the others are."""
    fast, slow = actor(), actor()
    end = slow.work.remote(16 * TIMES, 0.5)
    waits = [
        Waiting(fast.take.remote(end), "learner rank 0", "step 3", fast, together="ranks"),
        Waiting(end, "learner rank 1", "step 3", slow, together="ranks"),
    ]
    assert watched_all(waits, Watchdog("learn", LIMIT_S)) == [16 * TIMES] * 2


def test_what_is_done_comes_back_at_once_and_a_short_wait_asks_nobody(actor: Callable[..., Any]) -> None:
    worker = actor(Worker, max_concurrency=1)  # a question for its progress would wait behind the work
    dog = Watchdog("learn", LIMIT_S)
    done = Waiting(worker.take.remote(7), "learner", "taking", worker)
    later = Waiting(worker.stick.remote(), "learner", "sticking", worker)
    assert dog.wait_any([later, done]) == [done] and value(done) == 7
    began = time.monotonic()
    assert dog.wait_any([later], 0.2) == [] and time.monotonic() - began < LIMIT_S


def test_a_driver_that_was_stopped_looks_again_before_it_judges(actor: Callable[..., Any]) -> None:
    worker = actor()
    dog, waiting = (
        Watchdog("learn", LIMIT_S),
        Waiting(worker.work.remote(36 * TIMES, 0.25), "learner", "step 3", worker),
    )
    assert dog.wait_any([waiting], 0.1) == []
    time.sleep(2 * LIMIT_S)  # more than the limit, without a look
    assert watched_all([waiting], dog) == [36 * TIMES]


def test_a_foreign_error_is_one_line_with_its_place_and_its_traceback_in_a_file(
    actor: Callable[..., Any], tmp_path: Path
) -> None:
    worker, failures = actor(), Failures(tmp_path / "errors.log")
    with pytest.raises(ActorFailedError) as caught:
        watched(worker.bad.remote(), Watchdog("learn", LIMIT_S, failures), "learner", "step 3", worker)
    message = str(caught.value)
    place = r"tests/ray/small_actors\.py:\d+ in bad"
    log = re.escape(str(failures.file))
    assert re.fullmatch(rf"learner: ValueError: bad thing \(\S*{place}\); full traceback in {log}", message)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert "with a second line" in failures.file.read_text() and "Worker.bad" in failures.file.read_text()  # type: ignore[union-attr]


def test_a_failure_that_came_by_way_of_an_argument_names_who_failed_first(actor: Callable[..., Any]) -> None:
    first, second, third = actor(), actor(), actor()
    failures = Failures()
    failures.name(first, "sampler 1")
    dog = Watchdog("learn", LIMIT_S, failures)
    with pytest.raises(ActorFailedError, match=r"^sampler 1: ValueError: bad thing \(.* in bad\), needed by learner\n"):
        watched(third.take.remote(second.take.remote(first.bad.remote())), dog, "learner", "step 3", third)
    with pytest.raises(
        ActorFailedError, match=r"^Worker \(pid \d+ on \S+\): ValueError: bad thing .*needed by learner\n"
    ):
        wait(third.take.remote(second.take.remote(first.bad.remote())), FAR_S, "learner")
    with pytest.raises(GradingError, match=r"^graders: all of them failed$"):
        watched(third.take.remote(second.take.remote(first.refuse.remote())), dog, "learner", "step 3", third)
    with pytest.raises(DataLostError, match=r"^learner: its input is lost with sampler 1: its process is gone"):
        watched(third.take.remote(second.take.remote(first.die.remote())), dog, "learner", "step 3", third)


def test_an_actor_that_dies_is_said_to_be_dead_and_its_last_words_are_kept(
    actor: Callable[..., Any], tmp_path: Path
) -> None:
    worker, failures = actor(), Failures(tmp_path / "errors.log")
    with pytest.raises(ActorDiedError, match=r"^learner: its process is gone \(pid \d+ on \S+\): killed, out of mem"):
        watched(worker.die.remote(), Watchdog("learn", FAR_S, failures), "learner", "step 3", worker)
    assert "these were my last words" in failures.first()
    with pytest.raises(ActorDiedError, match="killed"):
        wait(worker.take.remote(1), FAR_S, "learner: again")
    failures.add("sampler 0", StalledError("a late consequence"))
    assert "these were my last words" in failures.report(StalledError("a late consequence"))
    failures.forget()
    assert failures.first() == "" and failures.report(StalledError("x")) == "x"


def test_a_constructor_that_fails_is_an_error_and_no_death(actor: Callable[..., Any]) -> None:
    with pytest.raises(ActorFailedError, match=r"^learner: LookupError: no such base \(.* in __init__\)\n") as caught:
        wait(actor(Worker, True).take.remote(1), FAR_S, "learner")
    assert not isinstance(caught.value, ActorDiedError)


def test_a_runtime_environment_that_cannot_be_made_is_told_with_its_cause(ray_cluster: str, actor: Any) -> None:
    package = "gcs://_ray_pkg_0123456789abcdef.zip"
    lost = ray.remote(Worker).options(num_cpus=0, runtime_env={"working_dir": package}).remote(False)
    with pytest.raises(ActorFailedError, match=rf"^learner: RuntimeEnvSetupError: .*{re.escape(package)}") as caught:
        wait(lost.take.remote(1), FAR_S, "learner")
    assert "\n" not in str(caught.value)


def test_lost_data_is_told_apart_from_a_death(actor: Callable[..., Any]) -> None:
    owner, worker = actor(), actor()
    (ref,) = wait(owner.own.remote(), FAR_S, "owner")
    ray.kill(owner)
    time.sleep(2)  # until the cluster knows
    for call in (lambda: wait(worker.take.remote(ref), FAR_S, "learner"), lambda: wait(ref, FAR_S, "learner")):
        with pytest.raises(DataLostError, match=r"^learner: its input is lost"):
            call()


def test_the_tail_of_a_log_is_there_for_the_living_and_the_dead(actor: Callable[..., Any]) -> None:
    worker = actor()
    worker.stick.remote()
    ray.get(worker.progress.remote())
    until(lambda: "entering the long sleep" in tail(worker), "its log", state=lambda: tail(worker))
    ray.kill(worker)
    time.sleep(0.3)
    began = time.monotonic()
    assert "entering the long sleep" in tail(worker) and str(process_of(worker)) in tail(worker)
    assert time.monotonic() - began < LIMIT_S


class AskedBody(SamplerBody):
    """Takes a prompt, where a job's sampler takes the numbers of problems."""

    async def complete(self, max_tokens: int) -> int:
        params = SamplingParams(max_tokens=max_tokens, seed=1, stop=[])
        prompt = np.arange(8, dtype=np.int32) + 5
        rollouts = await self.sampler.sample(np.array([3]), prompt, offsets_of([8]), 1, params, None, -1)
        return len(rollouts.tokens)


class AskedSampler(SamplerActor):
    body = AskedBody

    def __init__(self, config: JobConfig, index: int) -> None:
        super().__init__(config, index)
        self.constructed_in = threading.get_native_id()

    async def thread_of_its_event_loop_constructed_it(self) -> bool:
        return self.constructed_in == threading.get_native_id()

    async def complete(self, max_tokens: int) -> int:
        return await self.host.call("complete", max_tokens)

    async def host_pid(self) -> int:
        assert isinstance(self.host, HostProcess)
        return self.host.pid


@pytest.fixture(scope="module")
def sampler(connected: None, micro_base: Path) -> Iterator[Any]:
    """A started sampler actor."""
    config = parse_config(JOB, [f"model.path={micro_base}"])
    made = ray.remote(AskedSampler).options(num_cpus=0.5, max_concurrency=1000).remote(config, 0)
    wait(made.preload.remote(), FAR_S, "sampler 0")
    wait(made.start.remote(str(micro_base)), FAR_S, "sampler 0")
    yield made
    ray.kill(made)


def engine_of(sampler: Any) -> psutil.Process:
    """The process that computes, below the actor's."""
    process = process_of(sampler)
    assert process is not None
    below: dict[psutil.Process, str] = {}

    def engines() -> list[psutil.Process]:
        below.clear()
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                below[child] = child.name() + "".join(child.cmdline())
        return [child for child, title in below.items() if "EngineCore" in title]

    until(lambda: len(engines()) == 1, "the engine's process", state=lambda: str(below))
    return engines()[0]


def test_a_stopped_engine_is_a_stall_that_names_its_sampler(sampler: Any) -> None:
    dog = Watchdog("sample", LIMIT_S)
    assert watched(sampler.complete.remote(60), dog, "sampler 0", "sampling 1 completion of problem 3", sampler) == 60
    engine = engine_of(sampler)
    engine.suspend()
    try:
        waiting = Waiting(sampler.complete.remote(60), "sampler 0", "sampling 1 completion of problem 3", sampler)
        with pytest.raises(StalledError) as caught:
            watched_all([waiting], dog)
        message = str(caught.value)
        assert "waiting for sampler 0: sampling 1 completion of problem 3; since" in message
        assert "its progress last changed" in message and "log of sampler 0: end of" in message
    finally:
        engine.resume()
    assert wait(waiting.ref, FAR_S, "sampler 0") == 60


def test_ray_constructs_an_async_actor_in_the_thread_that_lives_as_long_as_it(sampler: Any) -> None:
    """With this thread the kernel ends the host process. It is the one in which the actor's event loop runs."""
    assert wait(sampler.thread_of_its_event_loop_constructed_it.remote(), FAR_S, "sampler 0")


def test_a_stopped_host_process_is_a_stall_that_names_its_sampler(sampler: Any) -> None:
    host = psutil.Process(wait(sampler.host_pid.remote(), FAR_S, "sampler 0"))
    host.suspend()
    try:
        waiting = Waiting(sampler.complete.remote(60), "sampler 0", "sampling 1 completion of problem 3", sampler)
        with pytest.raises(StalledError, match=r"waiting for sampler 0: sampling 1 completion of problem 3"):
            watched_all([waiting], Watchdog("sample", LIMIT_S))
    finally:
        host.resume()
    assert wait(waiting.ref, FAR_S, "sampler 0") == 60


def test_engine_and_host_process_end_with_their_actor_even_if_they_are_stopped(sampler: Any) -> None:
    engine, host = engine_of(sampler), psutil.Process(wait(sampler.host_pid.remote(), FAR_S, "sampler 0"))
    assert engine.parent() == host
    engine.suspend()
    host.suspend()
    ray.kill(sampler)
    until_gone([engine.pid, host.pid], "the processes of a killed actor to end")
