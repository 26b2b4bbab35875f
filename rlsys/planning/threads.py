"""Chooses the threads of learner and samplers where a job leaves them open, once, at the start of a run.

The number of threads can change the order of floating-point sums, so the choice is part of the run: the run directory
keeps it, and resumed and replayed steps use it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlsys.config import JobConfig, LearnerSection, SamplerSection
from rlsys.utils.free_cores import Cores

COLUMNS_PER_THREAD = 128  # of the hidden state; more than two threads were never measured

Section = LearnerSection | SamplerSection
Role = Literal["learner", "sampler"]
ROLES: tuple[Role, Role] = ("learner", "sampler")


@dataclass(frozen=True, slots=True)
class Threads:
    """Thread counts, and the reason for each. No reason: the job sets the number."""

    learner: int
    sampler: int
    reasons: dict[Role, str]

    def __str__(self) -> str:
        reasons = {role: self.reasons.get(role, "configured") for role in ROLES}
        if reasons["learner"] == reasons["sampler"]:
            return f"learner {self.learner}, sampler {self.sampler} ({reasons['learner']})"
        return f"learner {self.learner} ({reasons['learner']}), sampler {self.sampler} ({reasons['sampler']})"


def choose_threads(config: JobConfig, hidden_size: int | None, joined: bool, sample: Callable[[], Cores]) -> Threads:
    """Thread counts of a job. `hidden_size`: None where it is not known. `joined`: the job joins a Ray cluster.
    `sample` is called only if the choice depends on the free cores."""
    open_roles: list[Role] = [role for role in ROLES if getattr(config, role).threads is None]
    known = {role: _without_cores(config, role, hidden_size, joined) for role in open_roles}
    cores = sample() if None in known.values() else None
    chosen: dict[Role, tuple[int, str]] = {}
    for role, found in known.items():
        if found is None:
            assert cores is not None and hidden_size is not None
            found = _of_free_cores(config, role, hidden_size, cores)
        chosen[role] = found
    counts = {role: chosen[role][0] if role in chosen else getattr(config, role).threads for role in ROLES}
    return Threads(counts["learner"], counts["sampler"], {role: why for role, (_, why) in chosen.items()})


def _without_cores(config: JobConfig, role: Role, hidden_size: int | None, joined: bool) -> tuple[int, str] | None:
    """The choice and its reason where free cores do not matter."""
    section = config.learner if role == "learner" else config.sampler
    if section.device == "cuda":
        return 1, f"{role}.num_gpus"
    if joined:  # the driver sees its own node alone; Ray has reserved these cores wherever the actor is
        return max(1, int(section.num_cpus)), f"{role}.num_cpus, on a cluster that the job joins"
    if hidden_size is None:
        return 1, "the model's size is not known on this machine"
    if hidden_size < 2 * COLUMNS_PER_THREAD:
        return 1, f"a model of hidden size {hidden_size} gains nothing from a second thread"
    return None


def _of_free_cores(config: JobConfig, role: Role, hidden_size: int, cores: Cores) -> tuple[int, str]:
    own, other = (config.learner, config.sampler) if role == "learner" else (config.sampler, config.learner)
    overlapped = config.overlap.max_policy_lag is not None
    usable, others = _usable(own, other, cores, overlapped), _usable(other, own, cores, overlapped)
    sharing = _processes(own) + (_processes(other) if overlapped and usable & others else 0)
    free = min(cores.free(usable), config.cluster.num_cpus or len(usable))
    threads = max(1, min(free // sharing, hidden_size // COLUMNS_PER_THREAD))
    how = "sampling and learning overlap" if overlapped else "sampling and learning alternate"
    return threads, f"{free} of {len(usable)} cores free, {how}"


def _usable(own: Section, other: Section, cores: Cores, overlapped: bool) -> frozenset[int]:
    """Cores of one role: its pins, else all; without those that the other is pinned to if both work at once."""
    if own.cores:
        return frozenset(own.cores)
    return cores.allowed - frozenset(other.cores if overlapped else ()) or cores.allowed


def _processes(section: Section) -> int:
    """Processes that compute at the same time."""
    return section.num_workers * (section.tensor_parallel_size if isinstance(section, SamplerSection) else 1)
