"""Ctrl-C: the step in flight is finished or dropped whole, and nothing is left behind.

One job starts Ray and gets the SIGINT of a terminal; one joins the tests' cluster and gets a SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from actors.faults.interrupts import Interrupts
from rlsys.config import JobConfig, dump_config, parse_config
from rlsys.run_state.jsonl import read_metrics
from tests.ray.conftest import JOB, WarmCluster
from tests.ray.test_recovery import actors_of, engines, hosts
from tests.waiting import TOO_SLOW, UP_ATTEMPTS, Sign, exit_code, run, size_of, until


@pytest.fixture(autouse=True)
def a_terminal_hangs_up() -> Iterator[None]:
    """Where the tests themselves run under nohup, their processes would ignore it as well."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, inherited)


SIGNALS = [signal.SIGINT, signal.SIGTERM]
KINDS = ("LearnerActor", "SamplerActor", "RewardActor", "GroupAdvantageActor")


@dataclass
class Interrupted:
    """A job that got a signal after its second step."""

    config: JobConfig
    folder: Path
    short_tmp: Path  # its path leaves room for the names of sockets, which pytest's own does not
    environment: dict[str, str]
    # Of processes on the tests' cluster, after step 2.
    parents: dict[str, set[int]] = field(default_factory=dict)
    grader_libraries: list[str] = field(default_factory=list)
    scaled: str = ""  # what `rlsys scale` said, where the job has a Ray of its own

    def __post_init__(self) -> None:
        (self.folder / "job.yaml").write_text(dump_config(self.config))
        self.process = self.begin()

    def begin(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rlsys", "train", str(self.folder / "job.yaml")]
        with self.output.open("w") as file:
            return subprocess.Popen(command, env=self.environment, stdout=file, stderr=file, start_new_session=True)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def signs(self) -> tuple[Sign, Sign]:
        return size_of(self.output), Sign("steps", lambda: _steps(self.config))

    def wait_for_step_2(self) -> None:
        done, state = lambda: _steps(self.config) >= 2, self.output.read_text
        for attempt in range(1, UP_ATTEMPTS + 1):
            try:
                until(done, "step 2", *self.signs, process=self.process, state=state)
                return
            except AssertionError:
                if attempt == UP_ATTEMPTS or TOO_SLOW not in self.output.read_text():
                    raise
            self.process = self.begin()


def started(folder: Path, short_tmp: Path, base: Path, cluster: str | None) -> Interrupted:
    """Without a cluster it starts Ray."""
    config = parse_config(JOB, [f"model.path={base}", f"run.dir={folder}", "rl.steps=100000", "tracking.wandb=offline"])
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"HOME": str(folder), "RLSYS_TEST_MARK": str(folder)}
    env |= {"TMPDIR": str(short_tmp), "RAY_TMPDIR": tempfile.gettempdir()}
    if cluster:
        env["RAY_ADDRESS"] = cluster
    else:
        env.pop("RAY_AUTH_MODE", None)  # as users have it: Ray then makes a token for what it starts
    return Interrupted(config, folder, short_tmp, env)


@pytest.fixture(scope="module")
def interrupted(
    ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[signal.Signals, Interrupted]]:
    """One job for each signal, side by side."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        places = zip(SIGNALS, (Path(one), Path(other)), (None, ray_cluster), strict=True)
        jobs = {
            number: started(tmp_path_factory.mktemp("job"), short, micro_base, cluster)
            for number, short, cluster in places
        }
        try:
            for number, job in jobs.items():
                job.wait_for_step_2()
                if number == signal.SIGTERM:
                    job.parents = {kind: {each.ppid() for each in actors_of(kind)} for kind in KINDS}
                    job.parents["host"] = {each.ppid() for each in hosts()}
                    job.grader_libraries = [
                        _libraries(each)
                        for actor in actors_of("RewardActor")
                        for each in actor.children(recursive=True)
                    ]
                else:
                    command = [sys.executable, "-m", "rlsys", "scale", str(job.config.run_dir), "--samplers", "1"]
                    job.scaled = run(command, merged=True, env=job.environment).stdout
                interrupt(job, number)
            for job in jobs.values():
                exit_code(job.process, "the job", *job.signs, state=job.output.read_text)
            yield jobs
        finally:
            signal.signal(signal.SIGHUP, inherited)
            for job in jobs.values():
                if job.process.poll() is None:
                    os.killpg(job.process.pid, signal.SIGKILL)


def interrupt(job: Interrupted, number: signal.Signals) -> None:
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)  # what a terminal does: the whole foreground group
    else:
        job.process.send_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_finishes_the_step_saves_the_adapter_and_leaves_no_process(
    interrupted: dict[signal.Signals, Interrupted], number: signal.Signals
) -> None:
    check_ended(interrupted[number])


def test_a_run_with_a_ray_of_its_own_is_reached_from_another_process_by_its_directory(
    interrupted: dict[signal.Signals, Interrupted],
) -> None:
    """With the token that Ray makes for it, where nothing is said of one."""
    job = interrupted[signal.SIGINT]
    assert (job.folder / ".ray" / "auth_token").is_file()
    assert job.scaled.splitlines()[-1] == "the job has 1 sampler already"


def test_every_process_with_large_imports_of_a_job_on_a_warm_cluster_is_forked(
    interrupted: dict[signal.Signals, Interrupted], warm_cluster: WarmCluster
) -> None:
    servers = {int(pid) for pid in warm_cluster.said.rpartition("processes ")[2].split(", ")}
    for kind, parents in interrupted[signal.SIGTERM].parents.items():
        assert parents and parents <= servers, kind


def test_processes_of_a_job_that_starts_ray_and_wandb_are_forked(
    interrupted: dict[signal.Signals, Interrupted],
) -> None:
    output = interrupted[signal.SIGINT].output.read_text()
    assert "wandb: offline" in output and "was not forked" not in output, output


def test_grader_processes_import_no_ray(interrupted: dict[signal.Signals, Interrupted]) -> None:
    """multiprocessing would run Ray's worker program in each, as the main module of their parent."""
    libraries = interrupted[signal.SIGTERM].grader_libraries
    assert len(libraries) >= 2 and all("libpython" in each or "python" in each for each in libraries)
    assert not any("_raylet" in each for each in libraries)


@pytest.mark.soak
def test_a_signal_to_the_driver_ends_the_ray_that_it_started(micro_base: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short:
        job = started(tmp_path, Path(short), micro_base, None)
        try:
            job.wait_for_step_2()
            interrupt(job, signal.SIGTERM)
            exit_code(job.process, "the job", *job.signs, state=job.output.read_text)
            check_ended(job)
        finally:
            if job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)


def check_ended(job: Interrupted) -> None:
    text = job.output.read_text()
    assert job.process.returncode == 130, text
    assert "stopping after the current step" in text and "Traceback" not in text
    steps = [line["step"] for line in read_metrics(job.config.run_dir) if "reward/mean" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert (job.config.run_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert (job.config.run_dir / "report.html").is_file()
    mark = str(job.folder)
    left = Sign("processes", lambda: len(_marked(mark)))
    until(lambda: not left.read(), "all processes of the job to end", left, state=lambda: _marked(mark))
    until(lambda: not of_jobs(), "all processes of the job on the cluster to end", state=lambda: str(of_jobs()))
    assert not list(job.short_tmp.iterdir()), "temporary files stay behind"


def _libraries(process: psutil.Process) -> str:
    return " ".join(each.path for each in process.memory_maps())


def of_jobs() -> list[psutil.Process]:
    """On the tests' cluster."""
    if "RAY_ADDRESS" not in os.environ:  # where no test has started it
        return []
    return [*hosts(), *engines(), *(process for kind in KINDS for process in actors_of(kind))]


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
