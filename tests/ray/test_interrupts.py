"""Ctrl-C: the step in flight is finished or dropped whole, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from actors.faults.interrupts import Interrupts
from rlsys.config import JobConfig, dump_config
from rlsys.run_state.jsonl import read_metrics
from tests.waiting import Sign, exit_code, size_of, until


@pytest.fixture(autouse=True)
def a_terminal_hangs_up() -> Iterator[None]:
    """Where the tests themselves run under nohup, their processes would ignore it as well."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, inherited)


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder whose path leaves room for the names of sockets, which pytest's own does not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_the_adapter_and_leaves_no_process(
    job: Callable[..., JobConfig], tmp_path: Path, short_tmp: Path, number: signal.Signals
) -> None:
    config = job("rl.steps=100000")
    (tmp_path / "job.yaml").write_text(dump_config(config))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"HOME": str(tmp_path), "RLSYS_TEST_MARK": str(tmp_path)}
    env |= {"TMPDIR": str(short_tmp), "RAY_TMPDIR": tempfile.gettempdir()}
    command = [sys.executable, "-m", "rlsys", "train", str(tmp_path / "job.yaml")]
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        signs = size_of(output), Sign("steps", lambda: _steps(config))
        until(lambda: _steps(config) >= 2, "step 2", *signs, process=process, state=output.read_text)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # what a terminal does: the whole foreground group
        else:
            process.send_signal(number)
        code = exit_code(process, "the job", *signs, state=output.read_text)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = output.read_text()
    assert code == 130, text
    assert "stopping after the current step" in text and "Traceback" not in text
    steps = [line["step"] for line in read_metrics(config.run_dir) if "reward/mean" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert (config.run_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert (config.run_dir / "report.html").is_file()
    left = Sign("processes", lambda: len(_marked(str(tmp_path))))
    until(lambda: not left.read(), "all processes of the job to end", left, state=lambda: _marked(str(tmp_path)))
    assert not list(short_tmp.iterdir()), "temporary files stay behind"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_between_steps_and_the_second_raises(number: signal.Signals) -> None:
    notes: list[str] = []
    interrupts = Interrupts(notes.append)
    with interrupts.watched(), interrupts.between_steps() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop() and len(notes) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_where_there_is_no_step_to_finish_a_signal_raises_at_once() -> None:
    with Interrupts(print).watched(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_hang_up_asks_once_however_often_it_comes() -> None:
    notes: list[str] = []
    with Interrupts(notes.append).watched() as interrupts, interrupts.between_steps() as should_stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert should_stop() and len(notes) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_hang_up_is_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(print).watched():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_hang_up_what_is_said_to_the_terminal_fails_no_longer(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from actors.faults.interrupts import Interrupts
with Interrupts(lambda text: print(text, flush=True)).watched() as interrupts, interrupts.between_steps() as asked:
    print("ready", flush=True)
    while not asked():
        signal.pause()
print("the end", flush=True)
Path(sys.argv[1]).write_text("saved")
"""
    ours, theirs = os.openpty()
    command = ["setsid", "-c", "-w", sys.executable, "-c", program, str(tmp_path / "done")]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)  # the terminal is gone; the kernel tells its session
    assert exit_code(process, "the program") == 0
    assert (tmp_path / "done").read_text() == "saved"


def _steps(config: JobConfig) -> int:
    if not (config.run_dir / "metrics.jsonl").is_file():
        return 0
    return sum("reward/mean" in line for line in read_metrics(config.run_dir))


def _marked(mark: str) -> list[str]:
    """Command lines of living processes that the job started, by an environment variable they inherit."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RLSYS_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
