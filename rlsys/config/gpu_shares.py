"""Which fractions of GPUs a learner and samplers may ask for. Refuses those that Ray would place badly.

Ray fills one GPU before it uses the next, so it places two actors of half a GPU each on one device even if another GPU
is free. NCCL refuses two ranks on one device, and two vLLM engines on one device count each other's memory as their
own. With more than half of a GPU each, workers get one device each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol


class Workers(Protocol):
    """Learner ranks or samplers, as their sections of a job describe them."""

    @property
    def num_workers(self) -> int: ...

    @property
    def num_gpus(self) -> float: ...


class Engines(Workers, Protocol):
    @property
    def tensor_parallel_size(self) -> int: ...

    @property
    def colocate(self) -> bool: ...

    @property
    def gpu_memory_utilization(self) -> float: ...


def may_share(learner: Workers, sampler: Workers) -> bool:
    """Whether Ray may put a learner rank and a sampler on one GPU."""
    return 0 < learner.num_gpus < 1 and 0 < sampler.num_gpus < 1


def start_in_order(shared: bool, load_learner: Callable[[], object], begin_engines: Callable[[], object]) -> None:
    """Load a learner, which is waited for, and begin to start engines: at the same time, or on shared GPUs the learner
    first. A vLLM engine measures what is free while it starts, and takes what others allocate meanwhile for its own."""
    for step in (load_learner, begin_engines) if shared else (begin_engines, load_learner):
        step()


def stacked(gpus: float) -> bool:
    """Whether Ray may put two workers that ask for `gpus` each on one GPU."""
    return 0 < gpus <= 0.5


def problems(learner: Workers, sampler: Engines) -> Iterator[str]:
    """What of a job's or a deployment's GPUs cannot work; each with what would."""
    if sampler.colocate:
        yield from _of_pairs(learner, sampler)
        return
    for who, section in (("learner", learner), ("sampler", sampler)):
        if section.num_workers > 1 and stacked(section.num_gpus):
            yield (
                f"{who}.num_workers {section.num_workers} of {who}.num_gpus {section.num_gpus:g}: Ray puts two of them "
                f"on one GPU, where {_WHY[who]}; set {who}.num_gpus=1, or {who}.num_workers=1"
            )
    together = learner.num_gpus + sampler.gpu_memory_utilization
    if may_share(learner, sampler) and learner.num_gpus + sampler.num_gpus <= 1 and together > 1:
        rest = 1 - learner.num_gpus
        yield (
            f"sampler.gpu_memory_utilization {sampler.gpu_memory_utilization:g} beside learner.num_gpus "
            f"{learner.num_gpus:g} is more than the memory of the GPU that they share; set "
            f"sampler.gpu_memory_utilization={rest:g}, or a smaller learner.num_gpus"
        )


_WHY = {
    "learner": "NCCL refuses two ranks",
    "sampler": "each engine takes the other's memory for its own",
}


def _of_pairs(learner: Workers, sampler: Engines) -> Iterator[str]:
    """A rank and a sampler that take turns on one GPU."""
    of_learner, of_sampler = learner.num_gpus, sampler.num_gpus
    if (of_learner > 0) != (of_sampler > 0):
        yield (
            f"sampler.colocate has learner and sampler take turns on one device; found learner.num_gpus {of_learner:g} "
            f"and sampler.num_gpus {of_sampler:g}; give both a part of a GPU, or set sampler.colocate=false"
        )
    elif sampler.tensor_parallel_size > 1 and of_sampler > 0:
        yield (
            f"sampler.colocate shares one GPU in a pair; found sampler.tensor_parallel_size "
            f"{sampler.tensor_parallel_size}, which Ray seats beside the learner's GPU and not on it; set "
            "sampler.colocate=false, or sampler.tensor_parallel_size=1"
        )
    elif of_learner + of_sampler > 1:
        yield (
            f"sampler.colocate shares one GPU in a pair; found learner.num_gpus {of_learner:g} + sampler.num_gpus "
            f"{of_sampler:g}; wanted at most 1 together, such as 0.5 each"
        )
    elif learner.num_workers > 1 and stacked(of_learner + of_sampler):
        yield (
            f"learner.num_workers {learner.num_workers}: Ray puts two pairs of learner.num_gpus {of_learner:g} + "
            f"sampler.num_gpus {of_sampler:g} on one GPU, where NCCL refuses two ranks; wanted 1 together, such as 0.5 "
            "each"
        )
