"""Cause of death of an engine's process, from its log. vLLM's error only says "see stack trace above"."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from rlsys.utils.gpu_errors import advised
from rlsys.utils.text_files import first_line

_TAIL_BYTES = 200_000
# What vLLM puts before each line: "(EngineCore pid=77) ERROR 11-20 22:29:28 [core.py:1136] "
_PREFIX = re.compile(r"^\((\w+)\S* pid=\d+\) ?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] ?)?")
_ENGINE = "EngineCore"
_WORKER = "Worker"  # of several: "Worker_TP1"
_SECOND_HAND = re.compile(r"WorkerProc initialization failed|Worker failed with error|Executor failed")
_PART = re.compile(r"nccl\w+Error: ")  # the second line of an NCCL error, which torch's exception comes before
_FOLLOWING = 4  # lines after an exception's first that may belong to it
_RAISED = re.compile(r"^(?:[\w.]*(?:Error|Exception)|SystemExit)\b(?:: .+)?$")


class EngineLog:
    """Output of the engine from now on: it inherits stdout and stderr, which are files in a Ray worker."""

    def __init__(self) -> None:
        self._sizes = {path: path.stat().st_size for path in _output_files()}

    def cause(self) -> str:
        """The last exception in the engine's log, with a remedy and the log's path; without one, that the process ended
        silently."""
        if not self._sizes:
            return "see its output"
        files = ", ".join(map(str, self._sizes))
        raised = [found for path, size in self._sizes.items() for found in _raised(path, size)]
        raised = [one for one in raised if not _SECOND_HAND.search(one.error)] or raised
        # A process that fails before vLLM sets up its logging writes without a prefix.
        for wanted in ((_ENGINE, _WORKER), ("",)):
            last = [one for one in raised if one.process.partition("_")[0] in wanted]
            if last:
                return f"{advised(last[-1].error, last[-1].around, 'sampler')} (all of it in {files})"
        return f"its process ended without a word: killed, or out of memory (log: {files})"


@dataclass(frozen=True, slots=True)
class Raised:
    """The last line of one traceback."""

    process: str  # "" where vLLM put no name before the line
    error: str
    around: str  # the line itself, the source line that raised it, and what follows: NCCL's reason stands there


def refusal(error: ValueError) -> str:
    """Why vLLM refused its arguments, in one line with a remedy. pydantic puts the reason on the second line."""
    reasons = [line.strip() for line in str(error).splitlines() if line.strip().startswith("Value error, ")]
    reason = reasons[0].removeprefix("Value error, ") if reasons else first_line(error)
    return advised(re.sub(r" \[type=value_error, .*", "", reason), str(error), "sampler")


def _output_files() -> list[Path]:
    statuses = [(number, os.fstat(number)) for number in (1, 2)]
    return [
        Path(os.readlink(f"/proc/self/fd/{number}"))
        for number, status in statuses
        if stat.S_ISREG(status.st_mode) and status.st_nlink  # a file without a name cannot be opened by it
    ]


def _raised(path: Path, start: int) -> list[Raised]:
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    prefixes = [_PREFIX.match(line) for line in lines]
    by_process: dict[str, list[str]] = {}
    found: list[tuple[str, int]] = []  # (process, index in its lines), in the order of the file
    for match, line in zip(prefixes, lines, strict=True):
        process, text = (match[1], line[match.end() :]) if match else ("", line)
        said = by_process.setdefault(process, [])
        if _RAISED.match(text) and not _PART.match(text):
            found.append((process, len(said)))
        said.append(text)
    return [_of(process, by_process[process], at) for process, at in found]


def _of(process: str, said: list[str], at: int) -> Raised:
    error, source = said[at], _source_line(said[:at])
    around = "\n".join([source, *said[at : at + 1 + _FOLLOWING]])
    if ":" not in error and source:  # no message, as of an assertion: the line that raised it says what it is about
        error = f"{error} at `{source}`"
    return Raised(process, error, around)


def _source_line(before: list[str]) -> str:
    """The last line of code of the traceback; Python marks parts of it below, with ^."""
    code = [line.strip() for line in before[-2:] if line.startswith("    ") and set(line.strip()) - set("^~ ")]
    return code[-1] if code else ""
