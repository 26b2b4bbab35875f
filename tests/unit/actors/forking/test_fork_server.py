"""Processes of a fork server: what they inherit, how they end, and how they start where the server gives none."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.forking import checks, client, model_check
from actors.forking.job_server import ForkServer, ServerAddress, delete_abandoned
from actors.forking.server import Imports, unreachable
from actors.hosting.host_process import HostProcess
from rlsys.config import SamplerSection, parse_config
from rlsys.errors import ActorDiedError, ConfigError
from rlsys.planning.model_folder import check_job
from rlsys.sampler.engine_start import prepare_environment
from tests.unit.actors.hosting.bodies import Body
from tests.unit.tokenization.test_renderer import END, tokenizer_of
from tests.waiting import is_alive, until_gone

REPORT = """
import gc, json, os, resource, signal, sys, tempfile
print(json.dumps({
    "arguments": sys.argv,
    "tasks": len(os.listdir("/proc/self/task")), "path": sys.path, "folder": os.getcwd(), "umask": os.umask(0),
    "nice": os.nice(0),
    "cores": sorted(os.sched_getaffinity(0)), "environment": dict(os.environ), "collects": gc.isenabled(),
    "thresholds": gc.get_threshold(), "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "interrupt": repr(signal.getsignal(signal.SIGINT)),
    "ignored": [int(n) for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN],
    "temporary": tempfile.gettempdir(), "name": __name__, "input": os.readlink("/proc/self/fd/0"),
    "oom": open("/proc/self/oom_score_adj").read(), "leads": os.getpgrp() == os.getpid(),
    "modules": [name for name in ("torch", "peft", "transformers", "vllm", "ray") if name in sys.modules],
}))
sys.exit(7)
"""
SLEEP = "import os, time; print(os.getpid(), 'torch' in __import__('sys').modules, flush=True); time.sleep(1e5)"


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        yield


def clean() -> dict[str, str]:
    """The environment without the variable that pytest changes at each test; the first is one that a server sets."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {"OMP_NUM_THREADS": "1", **kept}


@contextmanager
def running() -> Iterator[ForkServer]:
    server = ForkServer(1, environment=clean())
    try:
        server.wait_until_ready(600)
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with running() as made:
        yield made


def launcher(address: ServerAddress, role: str = "learner") -> list[str]:
    return [address.python, "-S", "-E", address.client, address.folder, address.fingerprint, role]


@contextmanager
def asleep(address: ServerAddress, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int, bool]]:
    """(the launcher, its worker, whether the worker was forked)."""
    program = folder / "sleep.py"
    program.write_text(SLEEP)
    process = subprocess.Popen([*launcher(address), str(program)], stdout=subprocess.PIPE, text=True, env=clean())
    assert process.stdout is not None
    try:
        pid, forked = process.stdout.readline().split()
        yield process, int(pid), forked == "True"
    finally:
        process.kill()
        process.wait()


def report(command: list[str], program: Path, **how: Any) -> dict[str, Any]:
    output = program.with_suffix(".txt")
    with output.open("w") as file:  # a server that hangs holds the other end of a pipe
        done = subprocess.run([*command, str(program), "one", "two"], stdout=file, text=True, check=False, **how)
    assert done.returncode == 7
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(
    ("role", "modules"), [("learner", ["torch", "peft", "transformers"]), ("actor", ["transformers"])]
)
def test_a_forked_process_is_a_fresh_one_in_all_but_its_imports(
    server: ForkServer, tmp_path: Path, role: str, modules: list[str]
) -> None:
    program, scratch = tmp_path / "program.py", tmp_path / "scratch"
    program.write_text(REPORT)
    scratch.mkdir()

    def before() -> None:
        os.umask(0o027)
        os.setpgid(0, 0)  # as Ray's raylet does, which kills this group with the worker
        os.nice(3)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1])
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        Path("/proc/self/oom_score_adj").write_text("500")

    how: Mapping[str, Any] = {
        "cwd": tmp_path,
        "env": {**clean(), "TMPDIR": str(scratch), "RAY_JOB_ID": "7", client.SERVER: "of its host"},
        "preexec_fn": before,
        "stdin": subprocess.DEVNULL,
    }
    fresh, forked = (report(command, program, **how) for command in ([sys.executable], launcher(server.address, role)))
    assert fresh.pop("modules") == [] and forked.pop("modules") == modules
    assert int(forked["environment"].pop(client.FORKED)) in server.processes()
    added = {name for name in forked["environment"] if name not in fresh["environment"]}
    assert added <= {"TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"}, "as an import of torch sets"
    for name in added:
        forked["environment"].pop(name)
    assert forked == fresh


def test_a_worker_ends_with_the_process_that_ray_knows(server: ForkServer, tmp_path: Path) -> None:
    with asleep(server.address, tmp_path) as (process, pid, forked):
        assert forked
        os.kill(pid, signal.SIGSTOP)
        process.kill()
        until_gone([pid], "the worker")


def test_the_process_that_ray_knows_ends_as_its_worker(server: ForkServer, tmp_path: Path) -> None:
    with asleep(server.address, tmp_path) as (process, pid, _):
        os.kill(pid, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_the_imports_of_an_engine_and_of_a_learner_have_sessions_of_their_own_and_those_of_actors_the_drivers(
    server: ForkServer,
) -> None:
    sessions = [os.getsid(pid) for pid in server.processes()]
    assert len(sessions) == len({*sessions}) == 3 and os.getsid(0) in sessions
    for pid in server.processes():
        assert os.getpgid(pid) == pid, "a terminal's Ctrl-C would reach it"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose check has something to note."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "head_dim": 32, "eos_token_id": END}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=264, num_hidden_layers=1, **shape)).save_pretrained(folder)
    tokenizer_of(None).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("whose", ["the job's", "the cluster's"])
def test_a_server_checks_a_model_as_the_driver_does(
    server: ForkServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    own, more = (server, []) if whose == "the job's" else (None, ["cluster.address=127.0.0.1:1"])
    good, bad = (parse_config("run: {name: toy}", [f"model.path={folder}", *more]) for folder in (model, tmp_path))
    notes = check_job(good)
    assert len(notes) == 1
    with pytest.raises(ConfigError) as error:
        check_job(bad)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # which the server has not, and an import may read
    monkeypatch.setattr(model_check, "check_job", lambda _: pytest.fail("the driver checks"))
    open_files = len(os.listdir("/proc/self/fd"))
    assert model_check.model_check(good, own)() == notes
    with pytest.raises(ConfigError) as there:
        model_check.model_check(bad, own)()
    assert str(there.value) == str(error.value)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_model_is_checked_here_if_no_server_can_or_its_process_ends(
    server: ForkServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "check_job", lambda _: ("here",))
    job = parse_config("run: {name: toy}", [f"model.path={model}"])
    monkeypatch.setenv("HF_HOME", "elsewhere")  # which the server has not
    assert model_check.model_check(job, server)() == ("here",)
    joins = parse_config("run: {name: toy}", [f"model.path={model}", "cluster.address=127.0.0.1:1"])
    assert model_check.model_check(joins, None)() == ("here",)
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setattr(model_check, "ENTRY", "os:abort")
    check = model_check.ForkedCheck(server.address.folder, job, lambda: ("here",))
    assert check.result() == ("here",)


def ordinary(address: ServerAddress, folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Why a worker was not forked; it has run all the same."""
    program = folder / "program.py"
    program.write_text(REPORT)
    found = report(launcher(address), program, env=clean() if environment is None else environment)
    assert found["modules"] == []
    reason: str = found["environment"][client.NOT_FORKED]
    return reason


def test_a_worker_starts_the_ordinary_way_if_the_server_is_gone_or_another_user_s(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    gone = ServerAddress(str(tmp_path / "none"), "f", sys.executable, client.__file__, 1)
    assert "No such file" in ordinary(gone, tmp_path)
    (tmp_path / "learner").touch()
    assert "Connection refused" in ordinary(ServerAddress(str(tmp_path), "f", *gone_rest(gone)), tmp_path)
    tmp_path.chmod(0o755)
    assert "this user's alone" in ordinary(ServerAddress(str(tmp_path), "f", *gone_rest(gone)), tmp_path)


def gone_rest(address: ServerAddress) -> tuple[str, str, int]:
    return address.python, address.client, address.threads


def test_a_worker_starts_the_ordinary_way_if_the_server_hangs(server: ForkServer, tmp_path: Path) -> None:
    pids = server.processes()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert "neither answered nor computed" in ordinary(server.address, tmp_path)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_server_forks_nothing_for_other_code_or_another_environment(server: ForkServer, tmp_path: Path) -> None:
    other = ServerAddress(server.address.folder, "0" * 32, *gone_rest(server.address))
    assert "code differs" in ordinary(other, tmp_path)
    for name in ("HF_HOME", "OMP_NUM_THREADS", "PYTHONPATH"):
        environment = {**clean(), name: "3"}
        assert ordinary(server.address, tmp_path, environment).endswith(f"differs from the server's: {name}")
    without = {name: value for name, value in clean().items() if name != "OMP_NUM_THREADS"}
    assert ordinary(server.address, tmp_path, without).endswith("OMP_NUM_THREADS")


class AnsweredAtOnce(socket.socket):
    """A connection whose other end has answered and closed before `sendmsg` returns."""

    peer: socket.socket

    def sendmsg(self, *arguments: Any) -> int:
        sent = super().sendmsg(*arguments)
        received, _ = client.receive_with_files(self.peer, 0)
        client.send(self.peer, {"status": received["ask"]})
        self.peer.close()
        return sent


def test_an_answer_counts_although_the_other_end_closes_before_the_sender_goes_on() -> None:
    ours, theirs = socket.socketpair()
    with AnsweredAtOnce(fileno=ours.detach()) as connection, theirs:
        connection.peer = theirs
        client.send(connection, {"ask": 3})
        assert client.receive(connection) == {"status": 3}


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("nice", -1, "nice level"),
        ("oom", -1, "OOM score"),
        ("cgroup", "other", "control groups"),
        ("namespaces", [], "namespaces"),
        ("limits", {"RLIMIT_NOFILE": (10, -1)}, "RLIMIT_NOFILE"),
    ],
)
def test_a_server_refuses_what_its_process_could_not_become(name: str, wanted: object, said: str) -> None:
    own = {**client.surroundings(), "nice": 0, "oom": 0, "limits": {"RLIMIT_NOFILE": (10, 20)}}
    assert unreachable(own, own) is None
    assert unreachable({**own, name: wanted}, own) == said


def test_files_of_imported_modules_are_compared_with_their_state_at_the_import(tmp_path: Path) -> None:
    package = tmp_path / "module_of_a_server.py"
    package.write_text("")
    os.utime(package, (1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        __import__("module_of_a_server")
        files = checks.loaded_files(time.time_ns())
        assert checks.changed_file(files) is None
        package.write_text("changed = 1")
        assert checks.changed_file(files) == str(package)
        assert checks.changed_file(checks.loaded_files(0)) is not None, "written while a server imported"
        package.unlink()
        assert checks.changed_file(files) == str(package)


def test_a_server_forks_nothing_once_a_file_of_its_code_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "__file__", str(tmp_path / "actors" / "forking" / "checks.py"))
    code, table = tmp_path / "actors" / "code.py", tmp_path / "rlsys" / "table.yaml"
    for file in (code, table):
        file.parent.mkdir()
        file.write_text("a")
    given = {"fingerprint": checks.fingerprint(), "executable": sys.executable, "environment": {}}
    request = {**given, **client.surroundings()}
    imports = Imports("actor", {}, {}, checks.fingerprint(), checks.source_files(), {}, client.surroundings())
    assert imports.refusal(request) is None
    os.utime(code, (1, 1))
    assert imports.refusal(request) is None, "the same text"
    for change in (lambda: table.write_text("bb"), table.unlink, lambda: (table.parent / "more.py").write_text("")):
        change()
        assert imports.refusal(request) == "the code has changed since the server imported it"
        (table.parent / "more.py").unlink(missing_ok=True)
        table.write_text("a")
        assert imports.refusal(request) is None


PROGRAM = """
import dataclasses, json, sys, time
from actors.forking.job_server import ForkServer
server = ForkServer(1)
if len(sys.argv) > 1:
    server.wait_until_ready(600)
print(json.dumps(dataclasses.asdict(server.address)), flush=True)
time.sleep(1e5)
"""


def test_a_server_ends_with_the_process_that_started_it_and_its_workers_do_not(tmp_path: Path) -> None:
    for when in ([], ["ready"]):  # while it imports, and when it serves
        command = [sys.executable, "-c", PROGRAM, *when]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean()) as process, ExitStack() as stack:
            stack.callback(process.kill)
            assert process.stdout is not None
            address = ServerAddress(**json.loads(process.stdout.readline()))
            servers = Path(address.folder, client.PROCESSES)
            pids = [int(pid) for pid in servers.read_text().split()]
            assert len(pids) == 3 or not when
            if when:
                ray_knows, pid, forked = stack.enter_context(asleep(address, tmp_path))
            process.kill()
            until_gone(pids, "the server")
            until_gone([int(pid) for pid in servers.read_text().split()], "a server that was forked at last")
            delete_abandoned()
            assert not Path(address.folder).exists()
            if when:
                assert forked and is_alive(pid) and ray_knows.poll() is None
                os.kill(pid, signal.SIGTERM)
                assert ray_knows.wait(60) == client.UNKNOWN_EXIT


@pytest.mark.soak
def test_a_server_ends_when_nobody_has_asked_for_long() -> None:
    server = ForkServer(1, idle_s=0.5)
    pids = server.processes()
    try:
        server.wait()
        until_gone(pids, "the server")
        assert not Path(server.address.folder).exists()
    finally:
        server.close()


def hosted(server: ForkServer) -> HostProcess:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)
        for name, value in server.address.variables().items():
            patch.setenv(name, value)
        prepare_environment(SamplerSection(threads=1))  # as a sampler's actor does
        return HostProcess("sampler 3", Body, ["a body"])


@pytest.fixture
def environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_forked_host_process_has_vllm_imported_and_ends_as_a_started_one(
    server: ForkServer, environment: None
) -> None:
    async def use() -> None:
        host = hosted(server)
        assert not host.not_forked
        facts = await host.call("facts")
        assert psutil.Process(host.pid).cmdline()[0] == "rlsys host of sampler 3"
        assert facts["name"] == "a body" and facts["pid"] == host.pid and facts["path"] == sys.path
        assert facts["threads"] == facts["tasks"] == 1, "a body may fork"
        assert "libtorch" in Path(f"/proc/{host.pid}/maps").read_text()
        await host.close()
        assert host.exit_code == 0
        killed = hosted(server)
        await killed.call("facts")
        os.kill(killed.pid, signal.SIGKILL)
        with pytest.raises(ActorDiedError, match="signal 9"):
            await killed.call("facts")

    asyncio.run(asyncio.wait_for(use(), 600))


def test_a_forked_host_process_ends_with_its_actor_although_it_is_stopped(server: ForkServer, tmp_path: Path) -> None:
    program = (
        "import signal, os, sys, time\n"
        "from actors.hosting.host_process import HostProcess\n"
        "from rlsys.config import SamplerSection\n"
        "from rlsys.sampler.engine_start import prepare_environment\n"
        "from tests.unit.actors.hosting.bodies import Body\n"
        "prepare_environment(SamplerSection(threads=1))\n"
        "host = HostProcess('sampler 3', Body, ['a body'])\n"
        "os.kill(host.pid, signal.SIGSTOP)\n"
        "print(host.pid, host.not_forked, flush=True)\n"
        "time.sleep(1e5)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env=clean() | server.address.variables(), stdout=subprocess.PIPE, text=True
    ) as actor:
        assert actor.stdout is not None
        pid, *reason = actor.stdout.readline().split()
        assert not reason
        actor.kill()
        until_gone([int(pid)], "the host process")
