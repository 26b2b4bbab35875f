"""Environment of libgomp: threads that wait for each other, and what the user has set."""

from __future__ import annotations

import os
import sys

import pytest

from rlsys.utils.openmp import openmp_variables
from tests.waiting import run

# Both threads on one core, as where other processes keep the rest busy; bound once libgomp has counted the cores.
PROGRAM = """
import os, time, torch
values = torch.ones(2 * 32768)  # as many as torch divides among two threads
def cpu_s(threads):
    torch.set_num_threads(threads)
    began = time.process_time()
    for _ in range(300):
        values.exp()
    return time.process_time() - began
cpu_s(2)
for task in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(task), [min(os.sched_getaffinity(0))])
print(cpu_s(1), cpu_s(2))
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


def test_a_thread_gives_its_core_to_the_one_that_it_waits_for() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    done = run([sys.executable, "-c", PROGRAM], env={**kept, **openmp_variables(2)})
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = map(float, done.stdout.split())
    assert two < 20 * one  # 5; with libgomp's own count of 300,000 rounds 65 to 120


@pytest.mark.parametrize("users", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_a_user_has_set_is_left_as_it_is(users: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    assert openmp_variables(2).keys() - counts == {"GOMP_SPINCOUNT"}
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    assert openmp_variables(2) == counts
