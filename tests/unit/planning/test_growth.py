"""A process that multiplies matrices of ever new row counts, as an engine and a learner do, does not grow with them."""

from __future__ import annotations

import os

import pytest

from rlsys.planning.memory import ENGINE_MMAP_THRESHOLD, KERNEL_CACHES, LEARNER_KERNELS, MIB
from tests.forked import run_forked

SCRIPT = """
import sys
from pathlib import Path

import torch

from rlsys.planning.memory import bound_growth

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def multiply(rows):
    for weight in weights:
        x = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, requires_grad=True)
        torch.nn.functional.linear(x, weight).sum().backward()

torch.set_num_threads(1)
bound_growth(int(sys.argv[1]))
weights = [torch.zeros(pair, dtype=torch.bfloat16) for pair in ((320, 192), (192, 192), (1024, 192), (192, 512))]
multiply(16)
before = resident()
for rows in range(17, 17 + 80):
    multiply(rows)
print(resident() - before)
"""


def growth(hidden_size: int, **environment: str) -> int:
    """Bytes, in a process that has not computed yet: the caches read their sizes at their first use."""
    free = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    done = run_forked(SCRIPT, str(hidden_size), environment={**free, **environment})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("environment", [{}, dict.fromkeys(KERNEL_CACHES, "16")], ids=["ours", "the user's"])
def test_new_row_counts_cost_no_more_than_the_kernels_that_are_predicted(environment: dict[str, str]) -> None:
    """Without bounds 80 of them cost several hundred MiB where the CPU multiplies bfloat16."""
    assert growth(576, **environment) < LEARNER_KERNELS + 16 * MIB


BLOCKS = """
import ctypes, sys

from rlsys.planning.memory import MIB, bound_growth

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Info(ctypes.Structure):  # struct mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes = Info, ctypes.c_void_p, [ctypes.c_size_t]
bound_growth(int(sys.argv[1]), *map(int, sys.argv[2:]))
for mib in (0.5, 2, 6, 9):
    before = libc.mallinfo2().hblks
    libc.malloc(int(mib * MIB))
    print(libc.mallinfo2().hblks - before, end=" ")
"""


@pytest.mark.parametrize(
    ("arguments", "mapped"),
    [(["576"], "0 0 0 1"), (["576", str(ENGINE_MMAP_THRESHOLD)], "0 1 1 1")],
    ids=["learner", "engine"],
)
def test_blocks_of_the_threshold_and_more_are_returned_when_they_are_freed(arguments: list[str], mapped: str) -> None:
    done = run_forked(BLOCKS, *arguments)
    assert done.stdout.split() == mapped.split(), done.stderr
