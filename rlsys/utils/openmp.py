"""Environment variables of a process that computes with OpenMP: torch's CPU build, and vLLM's kernels for the CPU."""

from __future__ import annotations

from rlsys.utils.env_variables import env_variable

# Rounds that a thread polls for the others before it sleeps, about 0.1 ms. libgomp's own are 300,000 wherever the
# process alone has no more threads than cores: beside other busy processes a thread then polls on the core that the
# awaited one needs. Measured by benchmarks/threads.py.
SPINS = "5000"
SPIN_VARIABLE = "GOMP_SPINCOUNT"
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", SPIN_VARIABLE)


def openmp_variables(threads: int) -> dict[str, str]:
    """Variables for `threads` threads; the libraries read them when they are loaded. GOMP_SPINCOUNT and OMP_WAIT_POLICY
    of the user are left as they are."""
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if threads == 1 or env_variable(SPIN_VARIABLE) or env_variable("OMP_WAIT_POLICY"):
        return counts
    return {**counts, SPIN_VARIABLE: SPINS}
