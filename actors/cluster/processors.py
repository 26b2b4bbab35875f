"""Pins processes to CPU cores (`learner.cores`, `sampler.cores`)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from actors.cluster.joined_address import joined_address
from rlsys.config import LearnerSection, SamplerSection
from rlsys.errors import ConfigError


def pin(cores: Sequence[int], key: str) -> None:
    """Pin this process and its children to `cores`; empty: no pinning.

    Raises:
        ConfigError: a core is not available on this node. sched_setaffinity alone would silently use the others.
    """
    if cores:
        _refuse_absent(cores, key)
        os.sched_setaffinity(0, cores)


def refuse_absent_cores(address: str | None, learner: LearnerSection | None, sampler: SamplerSection) -> None:
    """Check the keys before anything starts if the job joins no cluster: then its actors run on this machine."""
    if joined_address(address):
        return
    if learner is not None:
        _refuse_absent(learner.cores, "learner.cores")
    _refuse_absent(sampler.cores, "sampler.cores")


def _refuse_absent(cores: Sequence[int], key: str) -> None:
    there = os.sched_getaffinity(0)
    absent = sorted(set(cores) - there)
    if absent:
        raise ConfigError(
            f"{key}: {', '.join(map(str, absent))} is not available to this process on {os.uname().nodename}. "
            f"Available cores: {_ranges(sorted(there))}. Choose among these, or set [] for no pinning"
        )


def _ranges(cores: Sequence[int]) -> str:
    """Format sorted numbers as ranges: ``0-3, 8``."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
