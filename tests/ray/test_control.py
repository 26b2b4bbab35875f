"""Requests to a running job find its driver and nobody else, and whoever waits for an answer is told the end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray

from actors import control
from actors.cluster import store
from actors.control import Control, ask, running
from rlsys.errors import ActorDiedError, ClusterError, ConfigError, StalledError

DRIVER = """
import sys, time
import ray
from actors.control import Control
ray.init(address=sys.argv[1], log_to_driver=False)
registered = [Control(run, {}) for run in sys.argv[2:]]
print(ray.get_runtime_context().get_job_id(), flush=True)
time.sleep(1e5)
"""


@pytest.fixture(scope="module", autouse=True)
def connected(ray_cluster: str) -> Iterator[None]:
    ray.init(address=ray_cluster, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def driver(ray_cluster: str) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts another driver that registers runs and answers nothing."""
    started: list[subprocess.Popen[str]] = []

    def start(*runs: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", DRIVER, ray_cluster, *runs]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        return started[-1], started[-1].stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()


def answering(run: str, handlers: dict[str, Callable[[int | None], str]]) -> Callable[[], None]:
    """A driver that listens in a thread until the returned function is called."""
    made, over = Control(run, handlers), threading.Event()

    def listen() -> None:
        while not over.wait(0.05):
            made.listen()

    thread = threading.Thread(target=listen)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()
        made.close()

    return end


def test_a_request_reaches_its_run_alone_and_answers_and_refusals_come_back() -> None:
    def refuse(about: int | None) -> str:
        raise ClusterError(f"no room for {about}")

    def note(about: int | None) -> str:
        seen.append(about)
        return "two"

    seen: list[int | None] = []
    end_one = answering("one", {"scale": lambda about: f"one {about}", "refuse": refuse})
    end_two = answering("one-two", {"scale": note})
    try:
        assert ask("one", "scale", 3) == "one 3" and ask("one", "scale", None) == "one None" and seen == []
        assert ask("one-two", "scale", 4) == "two" and seen == [4]
        with pytest.raises(ClusterError, match=r"^no room for 7$"):
            ask("one", "refuse", 7)
        with pytest.raises(ConfigError, match=r"^this run takes no request 'pause'; it takes scale, refuse$"):
            ask("one", "pause", None)
        assert running() == ["one", "one-two"]
        with pytest.raises(ConfigError, match="no running job is named 'on' on this cluster; running: one, one-two"):
            ask("on", "scale", 1)
    finally:
        end_one()
        end_two()
    assert running() == [] and store.keys("ask/") == store.keys("answer/") == []


def test_a_name_is_taken_until_its_run_or_its_driver_ends(
    driver: Callable[..., tuple[subprocess.Popen[str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = driver("taken")
    with monkeypatch.context() as patch:
        patch.setattr(control, "RELEASE_S", 0.0)
        with pytest.raises(ClusterError, match=r"a job named 'taken' is already running on this cluster; .*rlsys stop"):
            Control("taken", {})
        other = Control("other", {})
        with pytest.raises(ClusterError, match="'other' is already running"):
            Control("other", {})
        other.close()
        Control("other", {}).close()
    threading.Timer(1.0, process.kill).start()
    Control("taken", {}).close()  # waits for the end of the other one
    assert running() == [] and store.keys("job/") == []


def test_of_two_drivers_that_register_a_name_at_once_one_has_it(
    driver: Callable[..., tuple[subprocess.Popen[str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "RELEASE_S", 3.0)
    ids = [ray.get_runtime_context().get_job_id(), driver()[1]]
    begin, outcomes = threading.Barrier(2), list[str]()

    def register(driver_id: str) -> None:
        begin.wait()
        try:
            control._register("both", f"both/{driver_id}")
            outcomes.append(driver_id)
        except ClusterError:
            outcomes.append("refused")

    threads = [threading.Thread(target=register, args=[each]) for each in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (had,) = [outcome for outcome in outcomes if outcome != "refused"]
    assert store.keys("job/") == [f"job/both/{had}"]
    store.delete(f"job/both/{had}")


def test_who_asks_is_told_that_the_driver_ended_or_does_not_answer(
    driver: Callable[..., tuple[subprocess.Popen[str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = driver("silent")
    with monkeypatch.context() as patch:
        patch.setattr(control, "ANSWER_TIMEOUT_S", 0.5)
        with pytest.raises(StalledError, match=r"^job 'silent': no answer to 'stop' within 0\.5 s$"):
            ask("silent", "stop", None)
    assert store.keys("ask/") == [], "a request that nobody waits for is withdrawn"
    threading.Timer(0.5, process.kill).start()
    with pytest.raises(ActorDiedError, match=r"^job 'silent': it ended before it answered 'stop'$"):
        ask("silent", "stop", None)
    with pytest.raises(ConfigError, match="no running job is named 'silent' on this cluster; no job is running there"):
        ask("silent", "stop", None)


def test_a_driver_goes_on_while_the_head_node_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "RETRY_S", 1.0)
    end = answering("alone", {"stop": lambda _: "stops"})
    (head,) = [each for each in psutil.Process().children(recursive=True) if each.name() == "gcs_server"]
    with monkeypatch.context() as patch:
        patch.setattr(store, "ANSWER_S", 0.5)
        head.suspend()
        try:
            with pytest.raises(ClusterError, match=r"Ray's head node: no answer within 0\.5 s"):
                ask("alone", "stop", None)
            time.sleep(1.0)  # for the driver to look too
        finally:
            head.resume()
    assert ask("alone", "stop", None) == "stops"
    end()
