"""Speed of torch's matrix products in each precision on this CPU, the basis of rlsys/architectures/precision.py.

    python -m benchmarks.precision [--threads 2]

The products of a linear layer of the 54M shape, forward (x W') and backward (g W). Prints GFLOP/s; writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.shapes import S54
from rlsys.architectures.precision import multiplies_bfloat16

ROWS, REPEATS = 512, 3


def rate(work: Callable[[], object], flops: float) -> float:
    """Median GFLOP/s, after one call that is not counted."""
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return flops / statistics.median(times[1:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    inputs, outputs = S54["hidden_size"], S54["intermediate_size"]
    print(f"bfloat16 expected to be fast by this CPU's flags: {multiplies_bfloat16()}")
    for dtype in (torch.float32, torch.bfloat16):
        x, g = torch.randn(ROWS, inputs).to(dtype), torch.randn(ROWS, outputs).to(dtype)
        weight, flops = torch.randn(outputs, inputs).to(dtype), 2.0 * ROWS * inputs * outputs
        forward = rate(partial(torch.nn.functional.linear, x, weight), flops)
        backward = rate(partial(torch.matmul, g, weight), flops)
        print(f"{dtype}: forward {forward:.1f}, backward {backward:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
