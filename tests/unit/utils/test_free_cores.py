"""Cores of this process, their load, and the time limit of its container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.utils.free_cores import cpu_quota, sample_cores

BURN = "while True: pass"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({}, float("inf")),
    ],
    ids=str,
)
def test_the_quota_of_a_container_is_read_from_either_version_of_cgroups(
    files: dict[str, str], quota: float, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_a_core_on_which_another_process_computes_is_not_free() -> None:
    core = min(os.sched_getaffinity(0))
    burning = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{core}])\n{BURN}"])
    try:
        # The process starts within the first samples.
        assert any(sample_cores().busy[core] > 0.9 for _ in range(10))
    finally:
        burning.kill()
        burning.wait()


def test_the_cores_are_those_that_this_process_may_use() -> None:
    assert sample_cores().allowed == frozenset(os.sched_getaffinity(0))
