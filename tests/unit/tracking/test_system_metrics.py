"""Claims about the figures of the machine, against what the system says and what this process does to it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from rlsys.tracking.system_metrics import GIB, SystemMetrics

BOUND_S = 0.005  # of CPU time, for one look
TAKEN = 2**26  # bytes


def test_the_figures_are_those_of_this_machine(tmp_path: Path) -> None:
    found = SystemMetrics(tmp_path).figures()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    assert 0 < found["system/memory_gb"] < total
    assert found["system/memory_share"] == pytest.approx(found["system/memory_gb"] / total, rel=0.01)
    stat = os.statvfs(tmp_path)
    assert found["system/disk_free_gb"] == pytest.approx(stat.f_bavail * stat.f_frsize / GIB, abs=1)
    assert 0 <= found["system/cpu_percent"] <= 100


def test_memory_that_the_driver_takes_shows_in_its_figure(tmp_path: Path) -> None:
    system = SystemMetrics(tmp_path)
    before = system.figures()["system/driver_memory_gb"]
    with mmap.mmap(-1, TAKEN) as held:  # malloc may hand out pages that the process has already
        np.frombuffer(held, np.uint8)[:] = 1
        assert system.figures()["system/driver_memory_gb"] - before == pytest.approx(TAKEN / GIB, rel=0.1)


def test_a_busy_core_shows_since_the_last_look(tmp_path: Path) -> None:
    system, busy = SystemMetrics(tmp_path), subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        system.figures()
        time.sleep(0.5)
        assert system.figures()["system/cpu_percent"] > 50 / psutil.cpu_count()
    finally:
        busy.kill()
        busy.wait()


def test_a_process_that_is_watched_has_a_figure_for_as_long_as_it_lives(tmp_path: Path) -> None:
    system, other = SystemMetrics(tmp_path), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    gone = subprocess.Popen(["true"])
    gone.wait()
    system.watch({"learner": [other.pid], "sampler": [gone.pid]})
    found = system.figures()
    assert 0 < found["system/learner_memory_gb"] < 1
    assert "system/sampler_memory_gb" not in found
    other.kill()
    other.wait()
    assert "system/learner_memory_gb" not in system.figures()


def test_a_look_is_cheap(tmp_path: Path) -> None:
    system = SystemMetrics(tmp_path)
    system.watch({f"p{at}": [os.getpid()] for at in range(8)})
    took = []
    for _ in range(20):
        start = time.process_time()
        system.figures()
        took.append(time.process_time() - start)
    assert sorted(took)[5] < BOUND_S  # some take longer, with caches that are cold


def test_a_node_without_gpus_has_no_figures_of_gpus_and_none_is_asked_for(tmp_path: Path) -> None:
    notes: list[str] = []
    found = SystemMetrics(tmp_path, notes.append).figures()
    if not Path("/dev/nvidiactl").exists():
        assert not [name for name in found if "gpu" in name] and notes == []
