"""Compares a job with the available nodes: resources, predicted memory, and settings that waste either.

Pure functions from configuration, model shape and nodes to a Plan. Nothing is started and no weights are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlsys.architectures.model_shape import ModelShape
from rlsys.architectures.precision import computing_dtype
from rlsys.architectures.support import shape_problems
from rlsys.config import JobConfig
from rlsys.planning.fit import Node, amounts, groups, job_shortfalls, packs
from rlsys.planning.gpu_plan import gpu_shortfalls, gpu_warnings, torch_bytes
from rlsys.planning.memory import (
    DRIVER_MEMORY,
    GIB,
    IMPORTS,
    LIGHT_MEMORY,
    RoleMemory,
    engine_host_copy,
    gib,
    kv_bytes_per_token,
    learner_memory,
    micro_batch_tokens,
    sampled_at_once,
    sampler_memory,
    slot_width,
)
from rlsys.utils.free_memory import free_bytes

GB = 10**9  # the unit of data sheets: an L4 of 24 GB has 24.15e9 bytes, fewer than 24 GiB
MARGIN = 0.9  # usable share of the memory: predictions are accurate to 15 %, and other processes need memory too
LARGEST_BUDGET = 2**20
SHORT_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Row:
    """The actors of one role. `memory` is per actor; `imports` is added to it."""

    role: str
    count: int
    cpus: float
    gpus: float
    memory: RoleMemory
    imports: int  # bytes of the host
    on_gpu: bool  # True: `memory` is GPU memory, whose prediction was never measured
    pinned: int = 0  # bytes of pinned host memory that hold an engine's weights while it sleeps

    @property
    def host_bytes(self) -> int:
        return self.imports + self.pinned + (0 if self.on_gpu else self.memory.peak.total)


@dataclass(frozen=True, slots=True)
class Plan:
    rows: tuple[Row, ...]
    token_budget: int | None  # the largest useful one that fits; None if none fits or the GPU's memory is not known
    shortfalls: tuple[str, ...]
    warnings: tuple[str, ...]


def plan(config: JobConfig, dims: ModelShape, nodes: Sequence[Node]) -> Plan:
    """Compare a job with the nodes: memory per role, shortfalls (the job cannot run) and warnings."""
    rows = _rows(config, dims)
    shortfalls = [*_impossible(config, dims), *_placement(config, nodes)]
    if not shortfalls:
        shortfalls = [
            *_memory(config, rows, nodes),
            *gpu_shortfalls(config, dims, rows[0].memory, rows[1].memory, _gpu_bytes(nodes)),
        ]
    return Plan(rows, _token_budget(config, dims, nodes), tuple(shortfalls), tuple(_warnings(config, dims, nodes)))


def described_machine(cpus: int | None, memory_gb: float | None, gpus: int, gpu_memory_gb: float | None) -> Node:
    """A node from the options of `rlsys plan`. None: the value of this machine; no `gpu_memory_gb`: no GPU."""
    resources = {"CPU": float(cpus or len(os.sched_getaffinity(0)))}
    if gpu_memory_gb is not None:
        resources["GPU"] = float(gpus)
    memory = free_bytes() if memory_gb is None else int(memory_gb * GB)
    return Node("the described machine", resources, memory, None if gpu_memory_gb is None else int(gpu_memory_gb * GB))


def _rows(config: JobConfig, dims: ModelShape) -> tuple[Row, ...]:
    learner, sampler = config.learner, config.sampler
    return (
        Row(
            "learner",
            learner.num_workers,
            learner.num_cpus,
            learner.num_gpus,
            learner_memory(config, dims),
            IMPORTS["learner"],
            learner.device == "cuda",
        ),
        Row(
            "sampler",
            sampler.num_workers,
            sampler.num_cpus,
            sampler.num_gpus,
            sampler_memory(config, dims),
            IMPORTS["sampler"],
            config.sampler_device == "cuda",
            engine_host_copy(config, dims),
        ),
    )


def _impossible(config: JobConfig, dims: ModelShape) -> Iterator[str]:
    """Shortfalls that no cluster can remove."""
    yield from shape_problems(dims, config.model.max_length, config.lora, config.sampler, config.sampler.device)


def _placement(config: JobConfig, nodes: Sequence[Node]) -> Iterator[str]:
    """Shortfalls of resources. A starting job leaves packing to Ray, because `packs` can miss a placement."""
    short = list(job_shortfalls(config, nodes))
    yield from short
    wanted = [bundle for group in groups(config) for bundle in group.bundles]
    if not short and not packs(wanted, nodes):
        yield (
            "the nodes have enough resources in total, but the actors do not fit onto them: actors need "
            f"{'; '.join(amounts(bundle) for bundle in wanted)}; nodes have "
            f"{'; '.join(amounts(node.resources) for node in nodes)}. Request less per actor, or fewer workers"
        )


def _memory(config: JobConfig, rows: Sequence[Row], nodes: Sequence[Node]) -> Iterator[str]:
    asked, found = _host_bytes(config, rows), sum(node.memory for node in nodes)
    if asked > found:
        each = " + ".join(f"{row.count} x {row.role} {gib(row.host_bytes)}" for row in rows)
        yield (
            f"memory: {gib(asked)} predicted, {gib(found)} found, {gib(asked - found)} too few: {each} + others. "
            "Lower learner.token_budget, learner.logprob_chunk_tokens, sampler.kv_cache_gb or sampler.max_num_seqs"
        )
    for row in rows:
        if row.host_bytes > max(node.memory for node in nodes):
            yield f"memory: no node has the {gib(row.host_bytes)} predicted for a {row.role}"


def _host_bytes(config: JobConfig, rows: Sequence[Row]) -> int:
    graders = config.rewards.workers * LIGHT_MEMORY["grader process"]
    store = int(config.cluster.object_store_gb * GIB)
    rest = LIGHT_MEMORY["rewards"] + LIGHT_MEMORY["advantages"] + graders + DRIVER_MEMORY
    return sum(row.count * row.host_bytes for row in rows) + rest + store


def _token_budget(config: JobConfig, dims: ModelShape, nodes: Sequence[Node]) -> int | None:
    """The largest power of two with which the learner fits beside all other actors. Stops at the first value that holds
    all tokens of a step, because a larger one changes nothing."""

    def with_budget(budget: int) -> JobConfig:
        return config.model_copy(update={"learner": config.learner.model_copy(update={"token_budget": budget})})

    def fits(budget: int) -> bool:
        rows = _rows(with_budget(budget), dims)
        if config.learner.device == "cuda":
            total = _gpu_bytes(nodes) or 0
            return torch_bytes(rows[0].memory) <= MARGIN * total * min(1.0, config.learner.num_gpus)
        return _host_bytes(config, rows) <= MARGIN * sum(node.memory for node in nodes)

    best, budget = None, 2 ** math.floor(math.log2(max(config.model.max_length, 2)))
    while budget <= LARGEST_BUDGET and fits(budget):
        best = budget
        if micro_batch_tokens(with_budget(budget)) < budget:  # the batch is one micro-batch already
            break
        budget *= 2
    return best


def _warnings(config: JobConfig, dims: ModelShape, nodes: Sequence[Node]) -> Iterator[str]:
    """Settings with which the job runs, but slower or with more memory than needed."""
    yield from _sampler_warnings(config, dims)
    yield from gpu_warnings(config, dims, _gpu_bytes(nodes))
    yield from _adapter_warnings(config, dims)
    yield from _learner_warnings(config)
    yield from _resource_warnings(config, dims)
    if any(row.on_gpu for row in _rows(config, dims)) and all(node.gpu_memory is None for node in nodes):
        yield "GPU memory is not known, so the predictions for the GPU were not compared with it"


def _sampler_warnings(config: JobConfig, dims: ModelShape) -> Iterator[str]:
    sampler = config.sampler
    completions = config.rl.problems_per_step * config.rl.samples_per_problem
    each = math.ceil(completions / sampler.num_workers)
    if sampler.max_num_seqs < each:
        yield (
            f"sampler.max_num_seqs {sampler.max_num_seqs} is less than the {each} completions of a step per sampler, "
            f"so they are sampled in waves; sampler.max_num_seqs={each} samples them concurrently"
        )
    running = sampled_at_once(config)
    wanted = running * config.model.max_length * kv_bytes_per_token(config.model, dims, config.sampler_device)
    if config.sampler_device == "cpu" and wanted > sampler.kv_cache_gb * GIB:
        yield (
            f"sampler.kv_cache_gb {sampler.kv_cache_gb:g} does not hold {running} sequences of model.max_length "
            f"{config.model.max_length}: vLLM would preempt and recompute some; set "
            f"sampler.kv_cache_gb={math.ceil(wanted / GIB)}"
        )


def _adapter_warnings(config: JobConfig, dims: ModelShape) -> Iterator[str]:
    sampler, lora = config.sampler, config.lora
    room = config.model.max_length - max(config.rl.sampling.max_tokens, config.eval.max_tokens)
    if room < SHORT_PROMPT_TOKENS:
        yield (
            f"model.max_length {config.model.max_length} leaves {room} tokens for a prompt, and a longer prompt stops "
            f"the run; set model.max_length={config.model.max_length + SHORT_PROMPT_TOKENS} or more"
        )
    width = slot_width(sampler)
    if width > 2 * lora.rank:
        yield (
            f"sampler.max_lora_rank {sampler.max_lora_rank} allocates adapter slots of rank {width} for adapters of "
            f"lora.rank {lora.rank}; sampler.max_lora_rank={lora.rank} saves memory and time"
        )
    smallest = min(min(pair) for pair in (*dims.attention.values(), *dims.mlp.values()))
    if lora.rank > smallest:
        yield (
            f"lora.rank {lora.rank} is larger than the smallest matrix dimension, {smallest}; set lora.rank={smallest}"
        )


def _learner_warnings(config: JobConfig) -> Iterator[str]:
    learner, sampler = config.learner, config.sampler
    devices = {"learner": learner.device, "sampler": config.sampler_device}
    rounding = [
        who for who, device in devices.items() if computing_dtype(config.model.dtype, device) != config.model.dtype
    ]
    if rounding:
        yield (
            f"model.dtype {config.model.dtype}: torch has no fast kernels for it on this CPU, so the "
            f"{' and the '.join(rounding)} round the weights to it and compute in float32; model.dtype=float32 is "
            "equally fast"
        )
    if sampler.enforce_eager and config.sampler_device == "cuda":
        yield "sampler.enforce_eager on a GPU: decoding without CUDA graphs is slow; set sampler.enforce_eager=false"
    optim, steps = config.rl.optim, config.rl.steps
    if optim.schedule != "constant" and optim.final_share == 0 and (optim.decay_steps or steps) < steps:
        yield (
            f"rl.optim.decay_steps {optim.decay_steps}: the learning rate is 0 after step {optim.decay_steps}, but "
            f"rl.steps is {steps}; set rl.optim.final_share, or rl.optim.decay_steps={steps}"
        )


def _resource_warnings(config: JobConfig, dims: ModelShape) -> Iterator[str]:
    learner, sampler = config.learner, config.sampler
    completions = config.rl.problems_per_step * config.rl.samples_per_problem
    if learner.num_workers > completions:
        yield f"learner.num_workers {learner.num_workers}: a step has {completions} sequences, so some ranks are idle"
    # A single learner and a single sampler run alternately, so each may use the cores of both.
    alternating = config.overlap.max_policy_lag is None and learner.num_workers == sampler.num_workers == 1
    shared_cpus = {"learner": sampler.num_cpus, "sampler": learner.num_cpus} if alternating else {}
    for who, section in (("learner", learner), ("sampler", sampler)):
        if section.threads is not None and section.threads > max(1.0, section.num_cpus + shared_cpus.get(who, 0.0)):
            yield (
                f"{who}.threads {section.threads} is more than {who}.num_cpus {section.num_cpus:g}, so its threads "
                f"compete with other actors for cores; set {who}.num_cpus={section.threads}"
            )
    memory = learner_memory(config, dims).peak
    logits = memory.parts.get("logits and workspace", 0)
    if learner.logprob_chunk_tokens > 128 and 2 * logits > memory.total:
        yield (
            f"learner.logprob_chunk_tokens {learner.logprob_chunk_tokens}: logits take more than half of the learner's "
            f"{gib(memory.total)}; learner.logprob_chunk_tokens={learner.logprob_chunk_tokens // 4} saves most of that"
        )


def _gpu_bytes(nodes: Sequence[Node]) -> int | None:
    """Memory of the largest GPU in bytes; None if not known."""
    return max((node.gpu_memory for node in nodes if node.gpu_memory is not None), default=None)
