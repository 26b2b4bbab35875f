"""Why an engine's process ended. vLLM's error only says "see stack trace above", in a log nobody is shown."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_TAIL_BYTES = 200_000
# What vLLM puts before each line: "(EngineCore pid=77) ERROR 11-20 22:29:28 [core.py:1136] "
_PREFIX = re.compile(r"^\((\w+)\S* pid=\d+\) ?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] ?)?")
_ENGINE = "EngineCore"
_WORKER = "Worker"  # of several: "Worker_TP1"
_SECOND_HAND = re.compile(r"WorkerProc initialization failed|Worker failed with error|Executor failed")
_RAISED = re.compile(r"^(?:[\w.]*(?:Error|Exception)|SystemExit)\b(?:: .+)?$")


class EngineLog:
    """What the engine will write: it inherits stdout and stderr, which are files in a Ray worker."""

    def __init__(self) -> None:
        self._sizes = {path: path.stat().st_size for path in _output_files()}

    def cause(self) -> str:
        """The last exception that the engine reported, and where the rest is; else that it ended without a word."""
        if not self._sizes:
            return "see its output"
        files = ", ".join(map(str, self._sizes))
        raised = [found for path, size in self._sizes.items() for found in _raised(path, size)]
        raised = [(process, error) for process, error in raised if not _SECOND_HAND.search(error)] or raised
        # A process that fails before vLLM has it in hand writes without a prefix.
        for wanted in ((_ENGINE, _WORKER), ("",)):
            errors = [error for process, error in raised if process.partition("_")[0] in wanted]
            if errors:
                return f"{errors[-1]} (all of it in {files})"
        return f"its process ended without a word: killed, or out of memory (log: {files})"


def _output_files() -> list[Path]:
    statuses = [(number, os.fstat(number)) for number in (1, 2)]
    return [
        Path(os.readlink(f"/proc/self/fd/{number}"))
        for number, status in statuses
        if stat.S_ISREG(status.st_mode) and status.st_nlink  # a file without a name cannot be opened by it
    ]


def _raised(path: Path, start: int) -> list[tuple[str, str]]:
    """(process or "", error) of each traceback's last line."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    prefixes = [_PREFIX.match(line) for line in lines]
    said = [
        (match[1], line[match.end() :]) if match else ("", line) for match, line in zip(prefixes, lines, strict=True)
    ]
    return [(process, text) for process, text in said if _RAISED.match(text)]
