"""Thread counts of a new run, where the job sets none."""

from __future__ import annotations

from collections.abc import Callable

from actors.cluster.joined_address import joined_address
from rlsys.architectures.model_shape import hidden_size
from rlsys.architectures.support import local_config
from rlsys.config import JobConfig, ModelSection
from rlsys.planning.threads import Threads, choose_threads
from rlsys.utils.free_cores import Cores, sample_cores


def threads_of(config: JobConfig, sample: Callable[[], Cores]) -> Threads:
    """Thread counts of a job that starts now."""
    joined = joined_address(config.cluster.address) is not None
    return choose_threads(config, _hidden_size(config.model), joined, sample)


def with_chosen_threads(config: JobConfig, note: Callable[[str], None], sample: Callable[[], Cores]) -> JobConfig:
    """The job with both thread counts; `note` says which were chosen, and why."""
    threads = threads_of(config, sample)
    if threads.reasons:
        note(f"rlsys: threads: {threads}")
    return config.with_threads(threads.learner, threads.sampler)


def threads_on(config: JobConfig, joined: bool, described_cores: int | None) -> Threads:
    """Thread counts that a run would get, for `rlsys plan`. `described_cores`: of a machine that is not this one."""

    def described() -> Cores:
        return Cores(frozenset(range(described_cores or 0)), {})

    return choose_threads(config, _hidden_size(config.model), joined, described if described_cores else sample_cores)


def _hidden_size(model: ModelSection) -> int | None:
    """None: config.json is not on this machine yet."""
    if model.make is not None:
        return model.make.hidden_size
    assert model.path is not None
    found = local_config(model.path)
    return None if found is None else hidden_size(found[0])
