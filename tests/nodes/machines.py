"""Several machines on this one, each with a Ray node: what a cluster is to a job, without a cluster.

`Namespaces` gives each machine its own address, host name, processes, /tmp, /dev/shm and HOME; everything else of the
file system is read-only there, so nothing but the network joins them. It needs root. No name of a namespace or link is
left on the host: a machine is a process (`init`), its namespaces live as long as that process, and it is killed with
the process that made it.

`OneHost` is what is left without: several `ray start` with temp directories of their own, on one address and one file
system. They are gone when `close` returns, but outlive a test run that is itself killed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.waiting import (
    TOO_SLOW,
    UP_ATTEMPTS,
    USUAL_PRIORITY,
    Sign,
    cpu_of_all,
    exit_code,
    family,
    size_of,
    until,
    until_gone,
)

ROOT = Path(__file__).parents[2]
SUBNET = "10.88.0"
PORT = 6390
# This machine runs all nodes at once, and maybe more: a live node may be silent for a minute, after which a dead
# one is noticed at the latest.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "20000",
    "RAY_health_check_failure_threshold": "3",
}
# Killed with the thread that started it, so nothing is left where a test run is killed.
BOUND = ["setpriv", "--pdeathsig", "KILL"]

INIT = r"""
set -e
name=$1 address=$2 scratch=$3; shift 3
hostname "$name"
ip link set lo up
mount -t tmpfs -o size=4g tmpfs "$scratch"
mkdir "$scratch/home"
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" > "$scratch/hosts"
for kept in "$@"; do # code and interpreter, where they lie below /tmp
    mkdir -p "$scratch/${kept#/tmp/}"
    mount --bind "$kept" "$scratch/${kept#/tmp/}"
    mount -o remount,bind,ro "$scratch/${kept#/tmp/}"
done
mount --bind "$scratch/hosts" /etc/hosts
mount -o remount,bind,ro /
mount --rbind "$scratch" /tmp
mount -t tmpfs -o size=4g tmpfs /dev/shm
echo up
sleep infinity &
wait
"""


@dataclass
class Machine:
    """One machine: `tmp` is the folder of its own as it sees it, `root` is where its files lie for us."""

    name: str
    address: str
    tmp: str
    root: Path
    enter: list[str]  # runs a command there
    log: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    init: subprocess.Popen[str] | None = None
    dying: list[psutil.Process] = field(default_factory=list)

    def spawn(self, command: Sequence[str], log: Path, **env: str) -> subprocess.Popen[str]:
        with log.open("a") as out:
            process = subprocess.Popen(
                [*BOUND, *self.enter, "env", "-C", str(ROOT), *command],
                env=self.env() | env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TMP", "PYTEST"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
        ours = {"HOME": f"{self.tmp}/home", "TMPDIR": self.tmp, "PATH": path, "PYTHONPATH": str(ROOT)}
        ray = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"} | USUAL_PRIORITY
        return kept | {"OMP_NUM_THREADS": "1"} | ours | ray | HEALTH_CHECKS

    def sees(self, path: str) -> Path:
        """The file or folder that it knows by this absolute path."""
        return self.root / path.removeprefix("/")

    def kill(self) -> None:
        """The whole machine at once, as a power cut does. The kernel takes a second or more to clear it away."""
        self.dying = self.family()
        for member in [psutil.Process(self.init.pid)] if self.init else self.dying:
            with suppress(psutil.NoSuchProcess):
                member.kill()

    def bury(self) -> None:
        """Wait until nothing is left of a killed machine."""
        for process in self.started:
            exit_code(process, f"a process of machine {self.name}, which is killed")
        until_gone([process.pid for process in self.dying], f"all of machine {self.name}, which is killed, to end")

    def family(self) -> list[psutil.Process]:
        """Every process of the machine."""
        return [member for process in self.started for member in family(process.pid)]

    @property
    def started(self) -> list[subprocess.Popen[str]]:
        return [process for process in (self.init, *self.processes) if process]


@dataclass
class Driver:
    """A process on the head that drives a job."""

    process: subprocess.Popen[str]
    log: Path
    moves: Sign  # what its cluster computes; the driver itself waits most of the time

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        return exit_code(self.process, "the driver", size_of(self.log), self.moves, state=self.output)

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait for something that the running driver brings about."""
        signs = size_of(self.log), self.moves
        until(happened, what, *signs, process=self.process, state=self.output, poll_s=0.1)


class Machines(ABC):
    """A cluster in the making: the first machine added is the head."""

    own_files: bool  # each machine has files that the others cannot see

    def __init__(self) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="rn-"))  # short: Ray puts sockets below it
        self.all: dict[str, Machine] = {}
        self.killed: list[Machine] = []
        self.shared: dict[str, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def head(self) -> Machine:
        return next(iter(self.all.values()))

    @property
    @abstractmethod
    def ray_address(self) -> str: ...

    @abstractmethod
    def machine(self, name: str) -> Machine:
        """A machine without Ray, the first one with the address that the others find it by."""

    def cut_off(self, name: str) -> None:
        raise NotImplementedError("these machines share one address")

    @abstractmethod
    def put(self, folder: Path, name: str) -> str:
        """Copies of a folder at one path of every machine, also of those added later; returns that path."""

    def add(
        self, name: str, num_cpus: float = 2, resources: dict[str, float] | None = None, object_store_mb: int = 300
    ) -> Machine:
        """A machine with a Ray node that offers one of the resource named like it; back once it has joined."""
        machine = self.machine(name)
        first = machine is self.head
        join = ["--head", f"--port={self.ray_address.rpartition(':')[2]}", "--include-dashboard=false"]
        offered = {name: 1} | (resources or {})
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += join if first else [f"--address={self.ray_address}"]
        command += [*self.place(machine), f"--num-cpus={num_cpus}", f"--resources={json.dumps(offered)}"]
        command += [f"--object-store-memory={object_store_mb * 10**6}"]
        for attempt in range(1, UP_ATTEMPTS + 1):
            log = self.scratch / f"{name}-ray-{attempt}.log"
            process = machine.spawn(command, log)
            try:
                _until(process, log, "Ray runtime started")
                break
            except AssertionError:
                if attempt == UP_ATTEMPTS or TOO_SLOW not in log.read_text(errors="replace"):
                    raise
        return machine

    def place(self, machine: Machine) -> list[str]:
        """Options of `ray start` that say where the node is."""
        return [f"--node-ip-address={machine.address}"]

    def drive(self, *command: str, **env: str) -> Driver:
        """Start a command on the head, with the cluster's address in RAY_ADDRESS."""
        log = self.scratch / f"driver-{len(self.head.processes)}.log"
        moves = cpu_of_all(lambda: [process.pid for machine in self.all.values() for process in machine.started])
        return Driver(self.head.spawn(command, log, RAY_ADDRESS=self.ray_address, **env), log, moves)

    def train(self, config: Path, *overrides: str) -> Driver:
        """`rlsys train` on the head. The file is copied there."""
        there = f"{self.head.tmp}/{config.name}"
        shutil.copy(config, self.head.sees(there))
        return self.drive(sys.executable, "-m", "rlsys", "train", there, *overrides)

    def kill(self, name: str) -> float:
        """Kill a machine whole; returns the moment, of the monotonic clock."""
        machine = self.all.pop(name)
        self.killed.append(machine)
        machine.kill()
        return time.monotonic()

    def close(self) -> None:
        for name in reversed(list(self.all)):
            self.kill(name)
        for machine in self.killed:
            machine.bury()
        shutil.rmtree(self.scratch, ignore_errors=True)


class Namespaces(Machines):
    own_files = True

    @property
    def ray_address(self) -> str:
        return f"{SUBNET}.1:{PORT}"

    def machine(self, name: str) -> Machine:
        scratch, log = self.scratch / name, self.scratch / f"{name}.log"
        address = f"{SUBNET}.{len(self.all) + len(self.killed) + 1}"
        scratch.mkdir()
        kept = [str(path) for path in kept_folders() if path.is_relative_to("/tmp")]
        own = ["--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        with log.open("a") as out:
            init = subprocess.Popen(
                [*BOUND, "unshare", *own, "bash", "-c", INIT, "init", name, address, str(scratch), *kept],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        try:
            _until(init, log, "up\n")
        except AssertionError:
            init.kill()
            init.wait()
            raise
        [child] = psutil.Process(init.pid).children()
        pid = str(child.pid)
        machine = Machine(
            name=name,
            address=address,
            tmp="/tmp",
            root=Path("/proc", pid, "root"),
            enter=["nsenter", "-t", pid, "-m", "-u", "-i", "-n", "-p", "--"],
            log=log,
            init=init,
        )
        self.all[name] = machine
        self._connect(machine)
        for folder, source in self.shared.items():
            shutil.copytree(source, machine.sees(folder))
        return machine

    def _connect(self, machine: Machine) -> None:
        """The head's namespace holds the switch; a link's ends are made where they belong."""
        pid, hub = (each.enter[2] for each in (machine, self.head))
        inside, at_hub = (["nsenter", "-t", each, "-n", "ip"] for each in (pid, hub))
        if machine is self.head:
            _run(*inside, "link", "add", "switch", "type", "bridge")
            card = "switch"
        else:
            port, card = f"to-{machine.name}", "eth0"
            _run("ip", "link", "add", port, "netns", hub, "type", "veth", "peer", "name", card, "netns", pid)
            _run(*at_hub, "link", "set", port, "master", "switch", "up")
        _run(*inside, "addr", "add", f"{machine.address}/24", "dev", card)
        _run(*inside, "link", "set", card, "up")

    def cut_off(self, name: str) -> None:
        """Nothing reaches the machine any more, and its processes go on."""
        _run("nsenter", "-t", self.head.enter[2], "-n", "ip", "link", "set", f"to-{name}", "down")

    def put(self, folder: Path, name: str) -> str:
        there = f"/tmp/{name}"
        self.shared[there] = folder
        for machine in self.all.values():
            shutil.copytree(folder, machine.sees(there))
        return there


class OneHost(Machines):
    own_files = False

    def __init__(self) -> None:
        super().__init__()
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]

    @property
    def ray_address(self) -> str:
        import ray

        return f"{ray.util.get_node_ip_address()}:{self.port}"

    def machine(self, name: str) -> Machine:
        tmp = self.scratch / name
        (tmp / "home").mkdir(parents=True)
        address = self.ray_address.rpartition(":")[0]
        machine = Machine(name, address, str(tmp), Path("/"), [], self.scratch / f"{name}.log")
        self.all[name] = machine
        return machine

    def place(self, machine: Machine) -> list[str]:
        return [f"--temp-dir={machine.tmp}/ray"]

    def put(self, folder: Path, name: str) -> str:
        shutil.copytree(folder, self.scratch / name)
        return str(self.scratch / name)


def best() -> tuple[type[Machines], str]:
    """What this machine allows, and why it is not more."""
    try:
        with Namespaces() as machines:
            machines.machine("a")
            machines.machine("b")
    except (AssertionError, OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return OneHost, f"namespaces are refused here: {said.strip().splitlines()[-1]}"
    return Namespaces, ""


def kept_folders() -> list[Path]:
    """What a machine needs to run this code."""
    folders = {Path(folder).resolve() for folder in (ROOT, sys.prefix, sys.base_prefix)}
    return sorted(folder for folder in folders if not any(other in folder.parents for other in folders))


def _until(process: subprocess.Popen[str], log: Path, text: str) -> None:
    said = lambda: log.read_text(errors="replace")  # noqa: E731
    until(lambda: text in said(), f"{text.strip()!r} from it", size_of(log), process=process, state=said)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
