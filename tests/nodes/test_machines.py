"""What the tests of this folder stand on: machines share nothing, and nothing is left of one that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from tests.nodes.machines import Machine, Machines
from tests.waiting import FAR_S, until

LISTEN = "import socket, time; s = socket.create_server(('127.0.0.1', 7777)); print('up', flush=True)"
SERVE = f"{LISTEN}; time.sleep({FAR_S})"
KNOCK = "import socket; socket.create_connection(('127.0.0.1', 7777), timeout=300)"


def run(machine: Machine, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*machine.enter, *command], env=machine.env(), capture_output=True, text=True, check=False)


def refuse_one_host(machines: Machines) -> None:
    if not machines.own_files:
        pytest.skip("namespaces are refused here, so machines share an address and a file system")


def test_machines_share_no_file_memory_port_or_process(machines: Machines) -> None:
    refuse_one_host(machines)
    a, b = machines.machine("a"), machines.machine("b")
    server = a.spawn([sys.executable, "-c", SERVE], a.log)
    # that of the machine, and that of the server
    until(lambda: "up\nup" in a.log.read_text(), "a server", process=server, state=a.log.read_text)
    name = f"of-machine-a-{uuid.uuid4()}"
    for path in (f"/tmp/{name}", f"/dev/shm/{name}", f"{a.env()['HOME']}/{name}"):
        assert run(a, "touch", path).returncode == 0
        assert a.sees(path).exists() and not b.sees(path).exists() and not Path(path).exists(), path
    assert run(a, "touch", str(Path(__file__).parent / "x")).returncode != 0, "the code is shared, so it is read-only"
    assert [run(each, "hostname").stdout.strip() for each in (a, b)] == ["a", "b"]
    assert run(b, "getent", "hosts", "b").stdout.split()[0] == b.address != a.address
    assert run(a, sys.executable, "-c", KNOCK).returncode == 0
    assert "ConnectionRefusedError" in run(b, sys.executable, "-c", KNOCK).stderr
    assert SERVE in run(a, "ps", "-efww").stdout and SERVE not in run(b, "ps", "-efww").stdout


def test_nothing_is_left_of_machines_that_are_killed(machines: Machines) -> None:
    links, names = (
        os.listdir("/sys/class/net"),
        subprocess.run(["ip", "netns"], capture_output=True, check=False).stdout,
    )
    started = {name: machines.machine(name) for name in ("a", "b")}
    for machine in started.values():
        machine.spawn(["sh", "-c", "sleep 60001 & sleep 60002"], machine.log)
    until(lambda: len(sleepers()) == 4, "four processes", state=sleepers)
    machines.close()
    assert sleepers() == []
    assert not machines.scratch.exists()
    assert os.listdir("/sys/class/net") == links
    assert subprocess.run(["ip", "netns"], capture_output=True, check=False).stdout == names


def sleepers() -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] in (["sleep", "60001"], ["sleep", "60002"])
    ]
