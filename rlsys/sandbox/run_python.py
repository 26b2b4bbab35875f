"""Runs Python code that a model wrote, in a process without network and files and with limited resources.

It uses Linux namespaces (rlsys/sandbox/launcher.py). Where the kernel or the container forbids them, no code runs.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rlsys.errors import ConfigError
from rlsys.sandbox import launcher as sandbox_launch

MB = 2**20
STOP_S = 5.0  # for the launcher to kill its child and end
CUT, SLOW = "\n[cut]", "\n[stopped after {:g} s]"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Limits of one call of `run`, for all its processes together unless stated otherwise."""

    seconds: float = 3.0  # from start to end
    cpu_s: int = 3  # of each process
    memory_mb: int = 256  # of each process
    processes: int = 8  # threads count
    files_mb: int = 16  # of all files, which are in memory
    output_characters: int = 2000

    def run(self, code: str) -> str:
        """Run the code and return its stdout and stderr, cut to the limit, with a note if it was stopped.

        Raises:
            ConfigError: this machine allows no namespaces; no code was run.
        """
        root = tempfile.mkdtemp(prefix="rlsys-sandbox-")  # mount point of a file system that only the code sees
        try:
            return self._run(code, root)
        finally:
            shutil.rmtree(root, ignore_errors=True)  # the launcher has removed it, unless it refused

    def _run(self, code: str, root: str) -> str:
        deadline = time.monotonic() + self.seconds
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", sandbox_launch.__file__, json.dumps(self._wanted(root))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
        )
        assert launcher.stdin is not None and launcher.stdout is not None
        try:
            try:
                launcher.stdin.write(code.encode("utf-8", "replace"))
                launcher.stdin.close()
            except BrokenPipeError:  # the launcher has refused, and stdout has the reason
                pass
            written, note = self._read(launcher.stdout.fileno(), deadline)
        finally:
            launcher.terminate()
            try:
                launcher.wait(STOP_S)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
            launcher.stdout.close()
        text = written.decode("utf-8", "replace")
        if launcher.returncode == sandbox_launch.REFUSED:
            raise ConfigError(
                f"turns.python_tool: this machine cannot confine a process ({text.strip()}); no code was run"
            )
        return text[: self.output_characters] + note

    def check(self) -> None:
        """
        Raises:
            ConfigError: code cannot be run on this machine.
        """
        found = self.run("print(6 * 7)")
        if found.strip() != "42":
            raise ConfigError(f"turns.python_tool: a trial of print(6 * 7) gave {found!r}; wanted 42")

    def _wanted(self, root: str) -> dict[str, object]:
        python = Path(sys.executable)
        return {
            "owner": os.getpid(),
            "root": root,
            "python": str(python),
            # the interpreter's own folders, and where its links lead
            "paths": list(dict.fromkeys([sys.prefix, sys.base_prefix, str(python.resolve().parent.parent)])),
            "files_mb": self.files_mb,
            "limits": {
                "RLIMIT_CPU": self.cpu_s,
                "RLIMIT_DATA": self.memory_mb * MB,
                "RLIMIT_FSIZE": self.files_mb * MB,
                "RLIMIT_NPROC": self.processes,
                "RLIMIT_NOFILE": 64,
                "RLIMIT_CORE": 0,
            },
        }

    def _read(self, pipe: int, deadline: float) -> tuple[bytes, str]:
        """(output, note), read until every writer has closed it, or the limit of time or length is reached."""
        written, most = b"", 4 * self.output_characters  # bytes of a character at most
        while len(written) <= most:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return written, SLOW.format(self.seconds)
            piece = os.read(pipe, 65536)
            if not piece:
                break
            written += piece
        is_cut = len(written.decode("utf-8", "replace")) > self.output_characters
        return written, CUT if is_cut else ""
