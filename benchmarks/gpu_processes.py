"""Runs the parts of `make gpu-loop` as processes, each with a log file and a time limit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.gpu_journal import CUT_OFF, DONE, FAILED, Journal, as_text, read_facts

ROOT = Path(__file__).parents[1]
LOOK_S = 0.2
GRACE_S = 15.0  # from SIGTERM to SIGKILL: a job finishes its step and closes its files
TAIL_BYTES, TAIL_CHARACTERS = 20_000, 400
ENGINE = "EngineCore"  # in the title of vLLM's process
ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception)|SystemExit|error)\b[:(]")


def part_environment(device: str) -> dict[str, str]:
    """Environment of a part: no downloads, unbuffered output, and vLLM spawns its engine process on CUDA."""
    mine = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    mine |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "RAY_memory_monitor_refresh_ms": "0"}
    mine |= {"RAY_USAGE_STATS_ENABLED": "0"}
    if device == "cuda":
        mine["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    return {**os.environ, **mine}


def run_part(
    journal: Journal, part: str, module: str, arguments: Sequence[str], limit_s: float, environment: Mapping[str, str]
) -> str:
    """Run `python -m module` with its output in a log file; returns DONE, FAILED or CUT_OFF.

    The process writes its facts into the journal, and they are printed here as they arrive. A process that ends without
    having said why leaves the last error of its log as a fact.
    """
    log = journal.folder / f"{part.replace(' ', '-')}.log"
    command = [sys.executable, "-m", module, str(journal.folder), f"--began={journal.began}", f"--part={part}"]
    ends = time.monotonic() + limit_s
    shown = len(read_facts(journal.folder))
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments], stdout=output, stderr=output, env=dict(environment), start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < ends:
                shown = _print_from(journal, shown)
                time.sleep(LOOK_S)
        finally:
            is_over = process.poll() is not None
            end_process(process)
    _print_from(journal, shown)
    if is_over and process.returncode == 0:
        return DONE
    if not is_over or not any("error" in fact["fact"] for fact in read_facts(journal.folder) if fact["part"] == part):
        journal.fact(part, "last error in its log", last_error(log), log=log.name)
    return FAILED if is_over else CUT_OFF


def _print_from(journal: Journal, first: int) -> int:
    facts = read_facts(journal.folder)
    for line in facts[first:]:
        print(as_text(line), flush=True)
    return len(facts)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End the process, its group and whatever it started, Ray's and vLLM's processes included."""
    family = descendants(process.pid)
    for number, grace_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                family += descendants(process.pid)
    for child in family:
        if child.is_running():  # psutil compares start times, so a reused pid counts as ended
            child.kill()
    psutil.wait_procs(family, timeout=GRACE_S)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    return found


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def engines(pid: int) -> list[psutil.Process]:
    """vLLM's processes below `pid`."""
    return [process for process in descendants(pid) if ENGINE in title(process)]


def resident_peak(process: psutil.Process) -> int:
    """Peak resident bytes (VmHWM) of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0")
    return int(line.split()[1]) * 1024


def last_error(log: Path) -> str:
    """The last line of a log that names an error; else its last line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    said = [line for line in lines if line]
    errors = [line for line in said if ERROR.match(line)]
    return ([*said, *errors] or ["it wrote nothing"])[-1][:TAIL_CHARACTERS]
