"""A cluster of several Ray nodes on this machine, started by the commands that the files under deploy/ hold."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.util import get_node_ip_address

from tests import waiting
from tests.waiting import Sign, cpu_of_all, until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
HEAD_OF_README = "10.0.0.1"  # its example, which is nobody here


@dataclass(frozen=True)
class Entry:
    """What a file runs on a head and on a worker, each command as a shell would get it."""

    head: list[str]
    worker: list[str]


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def entry(name: str) -> Entry:
    """The commands of head and worker, read out of a file."""
    if name.startswith("Dockerfile"):
        cmd = re.search(r"^CMD (\[.*\])$", (DEPLOY / name).read_text(), re.MULTILINE)
        assert cmd, f"{name} has no CMD"
        worker = readme_start("by hand").split("`")[3]
        assert HEAD_OF_README in worker, worker
        return Entry([shlex.join(json.loads(cmd[1]))], [worker.replace(HEAD_OF_README, "$RAY_HEAD_IP")])
    config = load(name)
    if "cluster_name" in config:
        return Entry(config["head_start_ray_commands"], config["worker_start_ray_commands"])
    spec = config["spec"].get("rayClusterSpec", config["spec"])
    return Entry(_container(spec["headGroupSpec"]), _container(spec["workerGroupSpecs"][0]))


def readme_start(where: str) -> str:
    """The cell `start` of the row of README's table whose first cell holds ``where``."""
    for line in (DEPLOY / "README.md").read_text().splitlines():
        cells = line.split(" | ")
        if len(cells) == 3 and where in cells[0]:
            return cells[1]
    raise AssertionError(f"no row of deploy/README.md names {where!r}")


def readme_line(part: str) -> str:
    """The one indented line of README that holds ``part``."""
    lines = (DEPLOY / "README.md").read_text().splitlines()
    (line,) = (line.strip() for line in lines if line.startswith("    ") and part in line)
    return line


def _container(group: dict[str, Any]) -> list[str]:
    pod = group["template"]["spec"]
    return [shlex.join([*box["command"], *box.get("args", [])]) for box in (*pod["initContainers"], *pod["containers"])]


class Site:
    """What one cluster has for itself: a home, a token, ports, a folder per node; and the end of all it started."""

    def __init__(self, **more: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rlsd"))  # short: Ray's sockets lie below it
        self.home = self.folder / "home"
        self.bin = self.folder / "bin"
        for folder in (self.home, self.bin):
            folder.mkdir()
        (self.bin / "rlsys-node").symlink_to(DEPLOY / "node.sh")  # as in the images
        (self.home / "rlsys").symlink_to(ROOT)  # as the launcher copies it
        self.address = get_node_ip_address()
        self.port, self.dashboard, self.agent, self.client = _free_ports(4)
        self.more = more
        self.blocking: list[subprocess.Popen[str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def make_token(self) -> str:
        """As README says it; returns the token."""
        self.do(readme_line("ray get-auth-token"))
        return (self.home / ".ray" / "auth_token").read_text().strip()

    def do(self, command: str, node: str = "driver", **more: str) -> str:
        """A command that has to succeed; returns what it said."""
        done = self.run(command, node, **more)
        assert done.returncode == 0, self.said(f"{command}\n{done.stdout}")
        return done.stdout

    def environment(self, node: str) -> dict[str, str]:
        """Built from nothing: other tests of this process may have a cluster of their own in os.environ."""
        (self.folder / node).mkdir(exist_ok=True)
        path = (str(self.bin), str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin")
        return {
            "PATH": os.pathsep.join(path),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder / node),
            "RAY_HEAD_IP": self.address,
            "RLSYS_PORT": str(self.port),
            "RLSYS_DASHBOARD_PORT": str(self.dashboard),
            "RLSYS_AGENT_PORT": str(self.agent),
            "RLSYS_CLIENT_PORT": str(self.client),
            "RLSYS_RAY_OPTIONS": f"--num-cpus=2 --object-store-memory={150 * 2**20}",
            "RLSYS_WAIT_S": "1200",
            **waiting.USUAL_PRIORITY,
            **self.more,
        }

    def run(self, command: str, node: str = "driver", **more: str) -> subprocess.CompletedProcess[str]:
        """A command to its end, in the checkout, with both outputs in one."""
        return waiting.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=self.environment(node) | more,
            stdin=subprocess.DEVNULL,
            merged=True,
            signs=[self.moves],
        )

    def begin(self, command: str, node: str = "driver", **more: str) -> subprocess.Popen[str]:
        """A command that goes on beside the test, in a session of its own."""
        log = (self.folder / f"{node}.log").open("a")
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=ROOT,
            env=self.environment(node) | more,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.blocking.append(process)
        return process

    def start(self, commands: list[str], node: str, **more: str) -> None:
        """The commands of one node in turn; one that blocks, as in a container, goes on."""
        for command in commands:
            if "--block" in command.split():
                self.begin(command, node, **more)
            else:
                self.do(command, node, **more)

    def await_nodes(self, count: int, **more: str) -> None:
        assert self.do(f"deploy/node.sh await {count}", **more).strip().endswith(f"{count} nodes are up")

    def said(self, first: str = "") -> str:
        """What the commands that go on have printed, for a failed assertion."""
        return "\n".join([first, *(log.read_text()[-3000:] for log in self.folder.glob("*.log"))])

    def processes(self) -> list[int]:
        """All of this site: by session, or by its folder in the command line or the environment."""
        sessions = {int(file.read_text()) for file in self.folder.glob("*/*.session") if file.read_text().strip()}
        sessions |= {process.pid for process in self.blocking}
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except (OSError, ValueError):
                continue  # it ended meanwhile
            if state != "Z" and (session in sessions or f"{self.folder}/".encode() in words):
                found.append(int(entry.name))
        return found

    @property
    def moves(self) -> Sign:
        """What its nodes compute; who waits for them computes nothing."""
        return cpu_of_all(self.processes)

    def until_gone(self) -> None:
        left = Sign("processes", lambda: len(self.processes()))
        until(lambda: not left.read(), "all processes of a site to end", left, state=self.said, poll_s=0.1)

    def exit_code(self, process: subprocess.Popen[str]) -> int:
        """Of a command that `begin` started, once it has ended."""
        assert isinstance(process.args, list)
        return waiting.exit_code(process, " ".join(map(str, process.args)), self.moves, state=self.said)

    def end(self) -> None:
        for _ in range(3):  # what the dying still start
            for pid in self.processes():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            with suppress(AssertionError):
                until(lambda: not self.processes(), "the end", cap_s=2)
                break
        for process in self.blocking:
            self.exit_code(process)
        shutil.rmtree(self.folder, ignore_errors=True)


def new_token() -> str:
    """As KubeRay hands it to its containers."""
    return secrets.token_hex(32)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
