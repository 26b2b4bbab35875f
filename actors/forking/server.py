"""Processes that import once and are forked into Ray workers and samplers' host processes.

    a process without imports
       |  fork
       +-> server of actors      graders, tokenizers; no torch
       |
    a process with torch and transformers
       |  fork
       +-> sampler's server      and vLLM, with the environment of an engine
       |
    learner's server             and PEFT, the learner

Three servers: most actors need no torch, and an import of vLLM changes what a learner computes with: it registers
models with transformers and sets variables. Each has one thread and no CUDA. A request that came during the imports
waits. Ray itself is imported after the fork: its library reads the job's id and other variables when it is loaded. What
it imports, which is more than half of that time, is imported before.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import setproctitle  # of vLLM's requirements

from actors.forking import checks, client
from rlsys.config import SamplerSection
from rlsys.sampler.vllm.parent_process import end_with
from rlsys.utils.importing import without_collections
from rlsys.utils.openmp import VARIABLES, openmp_variables
from rlsys.utils.process_title import find_title

# What PEFT and vLLM both import. The engine is what a job waits for, so vLLM comes next, and the rest at the same time.
SHARED = (
    "numpy",
    "torch",
    "transformers",
    "transformers.utils.logging",
    "transformers.modeling_utils",
    "transformers.models.auto.auto_factory",
)
LEARNER = ("peft", "rlsys.learner.policy", "rlsys.learner.learner")
# What Ray imports, at its import and with the first call of an actor; not pyarrow, which starts a thread.
OF_RAY = (
    "asyncio",
    "attr",
    "filelock",
    "google.protobuf.any_pb2",
    "google.protobuf.json_format",
    "google.protobuf.struct_pb2",
    "google.protobuf.timestamp_pb2",
    "jsonschema",
    "msgpack",
    "multiprocessing",
    "psutil",
    "pydantic",
    "requests",
    "runpy",
    "starlette.datastructures",
    "tarfile",
    "tqdm",
    "uvloop",
    "yaml",
)
ACTOR = (
    *OF_RAY,
    "huggingface_hub",
    "numpy",
    "rlsys.advantages",
    "rlsys.planning.model_folder",
    "rlsys.rewards.grader",
    "rlsys.sampler.engine_start",
    "transformers",
)
PATH = list(sys.path)  # of a fresh interpreter, without this package's; set by actors.forking.job_server
Child = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Imports:
    """What a server checks before it forks."""

    role: str
    environment: Mapping[str, str]  # before the imports
    added: Mapping[str, str]  # variables that the imports set
    fingerprint: str
    sources: Mapping[str, tuple[int, int]]  # as the fingerprint found them
    files: Mapping[str, tuple[int, int]]
    surroundings: Mapping[str, Any]

    def refusal(self, request: Mapping[str, Any]) -> str | None:
        if request["fingerprint"] != self.fingerprint:
            return "the job's code differs from the server's"
        if checks.source_files() != self.sources and checks.fingerprint() != self.fingerprint:
            return "the code has changed since the server imported it"
        if request["executable"] != sys.executable:
            return f"the server's Python is {sys.executable}, not {request['executable']}"
        free = VARIABLES if self.role == "actor" else ()  # actors compute nothing that these divide
        names = checks.differing(self.environment, request["environment"], free)
        if names:
            return f"the environment differs from the server's: {', '.join(names)}"
        other = unreachable(request, self.surroundings)
        if other:
            return f"the server cannot give its process the asking one's {other}"
        changed = checks.changed_file(self.files)
        return changed and f"{changed} has changed since the server imported it"


def unreachable(wanted: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """What a process with `own` surroundings cannot change to those that are wanted, without privileges."""
    if wanted["namespaces"] != own["namespaces"]:
        return "namespaces"
    if wanted["cgroup"] != own["cgroup"]:
        return "control groups"
    if wanted["nice"] < own["nice"]:
        return "nice level"
    if wanted["oom"] < own["oom"]:
        return "OOM score"
    for name, (_, hard) in wanted["limits"].items():
        most = own["limits"][name][1]
        if most != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or hard > most):
            return name
    return None


REQUEST_S = 10.0  # for a request to be complete: its sender may get no core for a while


@dataclass
class Server:
    imports: Imports
    listener: socket.socket
    alive: int  # a pipe whose other end is held by the process that started the server
    idle_s: float
    folder: str
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    children: dict[int, tuple[int, socket.socket]] = field(default_factory=dict)  # by pidfd: (pid, connection)

    def serve(self) -> Child:
        """Answer requests; returns in a forked child alone, with what the child runs."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.alive, selectors.EVENT_READ)
        if self.imports.role == "actor":
            open(os.path.join(self.folder, client.READY), "w").close()
        while True:
            for key, _ in self.selector.select(self._patience()):
                if key.fileobj is self.listener:
                    child = self._answer(self.listener.accept()[0])
                    if child is not None:
                        return child
                elif key.fd == self.alive:
                    os._exit(0)
                else:
                    self._reap(key.fd)

    def _patience(self) -> float | None:
        """Seconds until the server has been idle for too long; it ends then."""
        if not self.idle_s or self.imports.role != "learner":
            return None
        left = os.stat(os.path.join(self.folder, client.PROCESSES)).st_mtime + self.idle_s - time.time()
        if left <= 0:
            os._exit(0)
        return left

    def _answer(self, connection: socket.socket) -> Child | None:
        connection.settimeout(REQUEST_S)
        try:
            request, files = client.receive_with_files(connection, 16)
        except (OSError, EOFError, ValueError):
            connection.close()
            return None
        child = None
        try:
            child = self._serve(connection, request, files)
        except OSError:  # the asking process is gone
            connection.close()
        if child is None:
            for file in files:
                os.close(file)
        return child

    def _serve(self, connection: socket.socket, request: dict[str, Any], files: list[int]) -> Child | None:
        with contextlib.suppress(OSError):  # deleted by hand: this request can be answered
            os.utime(os.path.join(self.folder, client.PROCESSES))
        if "describe" in request:
            client.send(connection, {"files": len(self.imports.files)})
            connection.close()
            return None
        why = self.imports.refusal(request)
        if why:
            client.send(connection, {"refused": why})
            connection.close()
            return None
        pid = os.fork()
        if pid == 0:
            self.selector.close()
            self.listener.close()
            for handle, (_, other) in self.children.items():
                os.close(handle)
                other.close()
            connection.close()
            os.close(self.alive)
            request["environment"] |= self.imports.added
            return lambda: become(request, files)
        client.kill_with_lifeline(pid, files[3])  # here, not in the child, which could be stopped before
        handle = os.pidfd_open(pid)
        self.children[handle] = pid, connection
        self.selector.register(handle, selectors.EVENT_READ)
        client.send(connection, {"pid": pid})
        return None

    def _reap(self, handle: int) -> None:
        self.selector.unregister(handle)
        pid, connection = self.children.pop(handle)
        os.close(handle)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # the asking process has ended
            client.send(connection, {"status": status})
        connection.close()


def become(request: Mapping[str, Any], files: list[int]) -> None:
    """In a forked child: be what a fresh process of the asking one would be, and run its program."""
    stdin, stdout, stderr, _, *others = files  # the lifeline stays open
    os.setpgid(0, 0)  # as Ray's workers: with a worker, Ray kills its group, which must not be the server's
    for number, file in enumerate((stdin, stdout, stderr)):
        os.dup2(file, number)
        os.close(file)
    _inherit(request)
    import numpy as np

    np.random.seed()  # `random` does so itself
    gc.enable()
    sys.argv = request["arguments"]
    if not request["entry"]:
        program = sys.argv[0]
        sys.path[:] = [os.path.dirname(program), *PATH]
        runpy.run_path(program, run_name="__main__")
        return
    sys.path[:] = request["path"]
    setproctitle.setproctitle(" ".join(sys.argv))
    module, _, function = request["entry"].partition(":")
    getattr(importlib.import_module(module), function)(*others)


def _inherit(request: Mapping[str, Any]) -> None:
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    os.sched_setaffinity(0, request["cores"])
    for name, limits in request["limits"].items():
        resource.setrlimit(getattr(resource, name), limits)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(request["oom"]))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ[client.FORKED] = str(os.getppid())
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def import_all(modules: tuple[str, ...]) -> None:
    with without_collections():
        for module in modules:
            importlib.import_module(module)


def prepare() -> dict[str, str]:
    """Set an engine's environment, as its actor does; returns the variables."""
    from rlsys.sampler.engine_start import prepare_environment

    before = dict(os.environ)
    prepare_environment(SamplerSection(threads=int(os.environ["OMP_NUM_THREADS"])))
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def import_for_actors() -> None:
    import_all(ACTOR)
    import transformers

    transformers.PreTrainedTokenizerFast  # noqa: B018  imported when it is asked for


def import_vllm() -> None:
    from rlsys.sampler.engine_start import preload_to_fork

    preload_to_fork("cpu")
    import_all(("rlsys.sampler.engine", "actors.hosting.sampler_body", "actors.hosting.serving"))


def run(folder: str, parent: int, alive: int, listeners: Mapping[str, int], idle_s: float, threads: int) -> Child:
    """Import and serve; returns in forked children alone."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    gc.disable()
    began_ns, sources, code = time.time_ns(), checks.source_files(), checks.fingerprint()
    if _forked(folder):
        role = "actor"
        os.setpgid(0, 0)  # a terminal's signals are for the driver
        os.environ.update(openmp_variables(1))
        before = dict(os.environ)
        import_for_actors()
    else:
        os.setsid()  # Linux divides cores among sessions: these imports are what a job waits for, not the driver's
        os.environ.update(openmp_variables(threads))
        before = dict(os.environ)
        import_all(SHARED)
        gc.freeze()
        role = "sampler" if _forked(folder) else "learner"
        if role == "sampler":
            os.setsid()
            find_title()  # not in the learner's server: Ray's own code for titles looks there later
            before |= prepare()
            import_vllm()
        else:
            import_all((*LEARNER, *OF_RAY))
    gc.freeze()
    for name, descriptor in listeners.items():
        if name != role:
            os.close(descriptor)
    files = checks.loaded_files(began_ns)
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    imports = Imports(role, before, added, code, sources, files, client.surroundings())
    return Server(imports, socket.socket(fileno=listeners[role]), alive, idle_s, folder).serve()


def _forked(folder: str) -> bool:
    """Fork; true in the child, which ends with this process."""
    here = os.getpid()
    if os.fork():
        return False
    end_with(here)
    with open(os.path.join(folder, client.PROCESSES), "a") as file:
        file.write(f"{os.getpid()}\n")
    return True


def main() -> None:
    given = json.loads(sys.argv[1])
    run(**given)()
