"""Run Python that a model wrote: in a process that sees no network and no files, bounded in all it takes.

Linux namespaces do it (rlsys/sandbox/launcher.py). Where the kernel or the container forbids them, nothing is run.
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
STOP_S = 5.0  # for the launcher to kill what it started and end
CUT, SLOW = "\n[cut]", "\n[stopped after {:g} s]"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """`run` takes a text of Python. Limits of all that one call starts, except where they say otherwise."""

    seconds: float = 3.0  # from start to end
    cpu_s: int = 3  # of each process
    memory_mb: int = 256  # of each process
    processes: int = 8  # threads count
    files_mb: int = 16  # of all files together; they are in memory
    output_characters: int = 2000

    def run(self, code: str) -> str:
        """What it wrote, both streams, cut to the limit; says at the end where it was stopped.

        Raises:
            ConfigError: this machine gives no namespaces; nothing was run.
        """
        root = tempfile.mkdtemp(prefix="rlsys-sandbox-")  # a file system is mounted here that only the code sees
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
            except BrokenPipeError:  # it has refused already, and says why
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
            raise ConfigError(f"turns.python_tool: this machine cannot confine a process ({text.strip()}): nothing ran")
        return text[: self.output_characters] + note

    def check(self) -> None:
        """
        Raises:
            ConfigError: code cannot be run here.
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
        """(what was written, what to say of it), until all who may write are gone, or it is enough."""
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
