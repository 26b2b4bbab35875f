"""Programs in processes forked from one that has torch and the learner imported, which takes a new process seconds.

For claims about what a program computes. A claim about what a program imports, or about an environment that is read
during an import, needs an interpreter of its own (tests/waiting.py).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

from tests.waiting import cpu_of, size_of, until

PRELOADED = ["rlsys.learner.learner", "rlsys.config"]


def fork_server() -> ForkServerContext:
    """The one server of this test process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # imported once, not once for each process
    return context


def _as_program(code: str, arguments: tuple[str, ...], environment: Mapping[str, str], out: Path, err: Path) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), stream)
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
