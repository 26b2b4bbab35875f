"""CPU cores that this process may use, and what other processes take of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
SAMPLE_S = 0.2
NOISE = 0.25  # cores; a core that others use less than this counts as free


@dataclass(frozen=True, slots=True)
class Cores:
    """`busy`: by core, the share of its time that other processes used. `quota`: limit of the container in cores."""

    allowed: frozenset[int]
    busy: Mapping[int, float]
    quota: float = float("inf")

    def free(self, among: Collection[int]) -> int:
        """Number of free cores among these, at least 1."""
        idle = sum(1 - self.busy.get(core, 0.0) for core in among)
        return max(1, int(min(idle + NOISE, self.quota)))


def sample_cores() -> Cores:
    """Measure the cores for SAMPLE_S, in which this thread waits."""
    # psutil lists the cores in the order of /proc/stat; one that is not listed counts as free
    busy = psutil.cpu_percent(interval=SAMPLE_S, percpu=True)
    shares = {core: percent / 100 for core, percent in enumerate(busy)}
    return Cores(frozenset(os.sched_getaffinity(0)), shares, cpu_quota())


def cpu_quota(cgroup: Path = CGROUP) -> float:
    """CPU time per time that the container's cgroup allows, in cores; infinite without a limit."""
    v2, v1 = cgroup / "cpu.max", cgroup / "cpu" / "cpu.cfs_quota_us"
    if v2.is_file():
        limit, period = v2.read_text().split()
    elif v1.is_file():
        limit, period = v1.read_text().strip(), v1.with_name("cpu.cfs_period_us").read_text()
    else:
        return float("inf")
    return int(limit) / int(period) if limit.isdigit() else float("inf")  # "max" in version 2, -1 in version 1
