"""Waits of tests end where nothing advances, and not before."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import waiting
from tests.waiting import (
    FAR_S,
    Sign,
    cpu_of,
    exit_code,
    family,
    is_alive,
    run,
    size_of,
    slowdown,
    until,
    until_async,
    until_gone,
)

QUICK: dict[str, Any] = {"stall_s": 0.4, "look_s": 0.05}
SLEEP = f"import time; time.sleep({FAR_S})"
SPIN = "while True: pass"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(started: list[subprocess.Popen[bytes]], program: str, **options: object) -> subprocess.Popen[bytes]:
    started.append(subprocess.Popen([sys.executable, "-c", program], **options))  # type: ignore[call-overload]
    return started[-1]


def passed(seconds: float) -> bool:
    time.sleep(0.01)
    return time.monotonic() - BEGAN[0] > seconds


BEGAN = [0.0]


@pytest.fixture(autouse=True)
def _begin() -> None:
    BEGAN[0] = time.monotonic()


def test_a_wait_returns_what_it_waited_for() -> None:
    answers: Iterator[Any] = iter([None, [], "there"])
    assert until(lambda: next(answers), "an answer") == "there"


def test_a_wait_in_which_nothing_moves_says_what_was_awaited_the_signs_and_the_last_state(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("12345")
    with pytest.raises(AssertionError) as caught:
        until(lambda: False, "step 3", size_of(tmp_path / "log"), state=lambda: "the last line", **QUICK)
    assert "s for step 3: nothing advanced for 0.4 s (bytes of log 5)\nthe last line" in str(caught.value)


def test_a_wait_goes_on_beyond_the_limit_while_a_sign_changes() -> None:
    count = itertools.count()
    assert until(lambda: passed(1.5), "the end", Sign("looks", lambda: next(count)), **QUICK)


def test_a_log_that_grows_and_a_file_that_appears_are_signs(tmp_path: Path) -> None:
    log, length = tmp_path / "log", itertools.count(1)
    sign = size_of(log)
    assert sign.read() == 0

    def write_and_pass() -> bool:
        log.write_text("x" * next(length))
        return passed(1.5)

    assert until(write_and_pass, "the end", sign, **QUICK)


def test_a_process_that_computes_moves_and_so_does_one_whose_children_compute(
    started: list[subprocess.Popen[bytes]],
) -> None:
    parent = f"import subprocess, sys; subprocess.run(['timeout', '60', sys.executable, '-c', {SPIN!r}])"
    for program in (SPIN, parent):
        process = start(started, program)
        BEGAN[0] = time.monotonic()
        assert until(lambda: passed(2), "the end", cpu_of(process.pid, step_s=0.05), stall_s=1, look_s=0.1)
        for member in family(process.pid):
            member.kill()


def test_a_process_that_sleeps_does_not_move(started: list[subprocess.Popen[bytes]]) -> None:
    sleeper = start(started, SLEEP)
    with pytest.raises(AssertionError, match=r"the end of it: nothing advanced for 0.4 s \(CPU seconds 0.0\)"):
        exit_code(sleeper, "it", **QUICK)


def test_a_process_that_only_polls_does_not_move(started: list[subprocess.Popen[bytes]]) -> None:
    poller = start(started, "import time\nwhile True: time.sleep(0.05)")
    with pytest.raises(AssertionError, match="nothing advanced"):
        exit_code(poller, "it", stall_s=2, look_s=0.1)


def test_cpu_time_of_children_that_have_ended_is_not_lost() -> None:
    sign = cpu_of(os.getpid(), step_s=0.01)
    child = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        used = until(sign.read, "CPU time of a child", stall_s=60)
    finally:
        child.kill()
        child.wait()
    assert sign.read() >= used  # type: ignore[operator]


def test_the_cap_ends_a_wait_that_moves_without_an_end() -> None:
    count = itertools.count()
    with pytest.raises(AssertionError, match=r"not within 0\.5 s, though something advanced"):
        until(lambda: False, "the end", Sign("looks", lambda: next(count)), look_s=0.05, cap_s=0.5)


def test_a_process_that_ends_fails_the_wait_at_once_with_its_exit_code(started: list[subprocess.Popen[bytes]]) -> None:
    process = start(started, "raise SystemExit(3)")
    with pytest.raises(AssertionError, match="for its step: the process ended with exit code 3"):
        until(lambda: False, "its step", process=process)


def test_the_last_act_of_a_process_counts(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    process = start(started, f"open({str(tmp_path / 'done')!r}, 'w')")
    process.wait()
    assert until((tmp_path / "done").exists, "its file", process=process)


def test_a_waiter_that_did_not_run_looks_again_before_it_judges() -> None:
    pauses = iter([1.5])

    def stopped_once() -> bool:
        time.sleep(next(pauses, 0))
        return passed(1.55)

    assert until(stopped_once, "the end", **QUICK)


def test_an_exit_code_is_returned_whatever_it_is(started: list[subprocess.Popen[bytes]]) -> None:
    assert [exit_code(start(started, f"raise SystemExit({code})"), "it") for code in (0, 1, 70)] == [0, 1, 70]


def test_processes_that_are_killed_are_gone_though_nobody_has_waited_for_them(
    started: list[subprocess.Popen[bytes]],
) -> None:
    two = [start(started, SLEEP) for _ in range(2)]
    with pytest.raises(AssertionError, match=str(two[0].pid)):
        until_gone([process.pid for process in two], "both to end", **QUICK)
    for process in two:
        process.kill()
    until_gone([process.pid for process in two], "both to end")
    assert not is_alive(two[0].pid)


def test_a_command_is_run_with_both_outputs() -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(2)"
    done = run([sys.executable, "-c", program])
    assert (done.returncode, done.stdout, done.stderr) == (2, "out\n", "err\n")
    merged = run([sys.executable, "-u", "-c", program], merged=True)
    assert (merged.stdout, merged.stderr) == ("out\nerr\n", "")


def test_a_command_that_hangs_is_killed_with_its_children_and_what_it_said_is_told(tmp_path: Path) -> None:
    program = f"import subprocess; p = subprocess.Popen(['sleep', '{FAR_S:.0f}']); print(p.pid, flush=True); p.wait()"
    with pytest.raises(AssertionError, match="nothing advanced") as caught:
        run([sys.executable, "-c", program], stall_s=3, look_s=0.1)
    until_gone([int(str(caught.value).splitlines()[-1])], "its child to end")


def test_what_happens_on_an_event_loop_is_waited_for_there() -> None:
    async def main() -> None:
        done: list[int] = []
        asyncio.get_running_loop().call_later(0.05, done.append, 1)
        assert await until_async(lambda: done, "a call") == [1]
        with pytest.raises(AssertionError, match="a second call: nothing advanced"):
            await until_async(lambda: len(done) > 1, "a second call", Sign("calls", lambda: len(done)), **QUICK)

    asyncio.run(main())


def test_a_machine_whose_core_is_shared_is_slower(started: list[subprocess.Popen[bytes]]) -> None:
    core = min(os.sched_getaffinity(0))
    pinned = f"import os; os.sched_setaffinity(0, [{core}])\n"
    for _ in range(2):
        start(started, pinned + SPIN)
    ask = f"{pinned}from tests.waiting import slowdown; print(slowdown())"
    assert float(run([sys.executable, "-c", ask], cwd=Path(waiting.__file__).parents[1]).stdout) > 1.5
    assert slowdown(0.01) >= 1
