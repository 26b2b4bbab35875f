"""Programs in processes forked from one that has torch and the learner imported, which takes a new process seconds.

The server is an interpreter of its own, which starts with the first program: a fork of pytest's process would inherit
open files, and objects that write to them.

For claims about what a program computes. A claim about what a program imports, or about an environment that is read
during an import, needs an interpreter of its own (tests/waiting.py).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from tests.waiting import cpu_of, size_of, until

# The learner's imports, and those that it makes once it loads a model.
PRELOADED = ["rlsys.learner.learner", "rlsys.config", "transformers.models.qwen3.modeling_qwen3"]
SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload(["tests.preloaded"])


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:
        with mock.patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
            return Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Process


def fork_server() -> ForkServerContext:
    """Python's own server, of which a process has one, is that of the pools under test: it keeps the imports of
    whichever pool was first, and a pool's processes must not begin with torch."""
    return _Context()


def _as_program(code: str, arguments: tuple[str, ...], environment: Mapping[str, str], out: Path, err: Path) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115 pytest has its own
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


@contextmanager
def forked(
    code: str, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[BaseProcess]:
    """Runs `code` as `python -c` does; `folder` gets `stdout` and `stderr`. Killed at the end of the block."""
    given = (code, arguments, dict(os.environ if environment is None else environment))
    process = fork_server().Process(target=_as_program, args=(*given, folder / "stdout", folder / "stderr"))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run_forked(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """As tests.waiting.run with `python -c`, stopped only where it stalls."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, err = folder / "stdout", folder / "stderr"
        with forked(code, *arguments, folder=folder, environment=environment) as process:
            assert process.pid is not None
            signs = (size_of(out), size_of(err), cpu_of(process.pid))
            until(lambda: process.exitcode is not None, "the end of a program", *signs)
            ended = process.exitcode
        assert ended is not None
        return CompletedProcess(["-c", *arguments], ended, out.read_text(), err.read_text())
