"""What a job will ask for, compared with what there is: places, memory, and settings that do not serve it.

Pure: nodes come in as numbers, the plan goes out as rows. Nothing is started and no weight is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlsys.architectures.model_shape import ModelShape
from rlsys.architectures.precision import computing_dtype
from rlsys.architectures.support import shape_problems
from rlsys.config import JobConfig, LearnerSection, SamplerSection
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

GB = 10**9  # GPUs and machines are sold by it: an L4 of 24 GB has 24.15e9 bytes, which 24 GiB would overstate
NODE_SHARE = 1e-3  # of a node's own resource "node:<address>", which there is 1 of
MARGIN = 0.9  # of the memory there is: predictions are 15 % right, and a machine has other work
LARGEST_BUDGET = 2**20
SHORT_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Node:
    """One machine as Ray would see it; `gpu_memory` is of the smallest GPU, None where nobody told."""

    name: str
    resources: Mapping[str, float]
    memory: int  # bytes
    gpu_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One role; `memory` is of one of `count`, `imports` comes on top."""

    role: str
    count: int
    cpus: float
    gpus: float
    memory: RoleMemory
    imports: int  # bytes of the host
    on_gpu: bool  # then the memory predicted is the GPU's, and was never measured
    pinned: int = 0  # bytes of the host where an engine's weights wait while it sleeps

    @property
    def host_bytes(self) -> int:
        return self.imports + self.pinned + (0 if self.on_gpu else self.memory.peak.total)


@dataclass(frozen=True, slots=True)
class Plan:
    rows: tuple[Row, ...]
    token_budget: int | None  # the largest that fits; None where no budget does or nothing is known of the GPU
    shortfalls: tuple[str, ...]
    warnings: tuple[str, ...]


def plan(config: JobConfig, dims: ModelShape, nodes: Sequence[Node]) -> Plan:
    """The whole comparison."""
    rows = _rows(config, dims)
    shortfalls = [*_impossible(config, dims), *_placement(config, nodes)]
    if not shortfalls:
        shortfalls = [
            *_memory(config, rows, nodes),
            *gpu_shortfalls(config, dims, rows[0].memory, rows[1].memory, _gpu_bytes(nodes)),
        ]
    return Plan(rows, _token_budget(config, dims, nodes), tuple(shortfalls), tuple(_warnings(config, dims, nodes)))


def described_machine(cpus: int | None, memory_gb: float | None, gpus: int, gpu_memory_gb: float | None) -> Node:
    """A machine that somebody has in mind; what is None is as here, and without `gpu_memory_gb` it has no GPU."""
    resources = {"CPU": float(cpus or len(os.sched_getaffinity(0)))}
    if gpu_memory_gb is not None:
        resources["GPU"] = float(gpus)
    memory = free_bytes() if memory_gb is None else int(memory_gb * GB)
    return Node("the described machine", resources, memory, None if gpu_memory_gb is None else int(gpu_memory_gb * GB))


def needs(section: LearnerSection | SamplerSection, index: int) -> dict[str, float]:
    """What learner rank or sampler number `index` asks of its node."""
    found = {"CPU": section.num_cpus, "GPU": section.num_gpus, **section.resources}
    if section.nodes:
        found[f"node:{section.nodes[index % len(section.nodes)]}"] = NODE_SHARE
    return {name: amount for name, amount in found.items() if amount > 0}


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
    """What no cluster could do."""
    yield from shape_problems(dims, config.model.max_length, config.lora, config.sampler, config.sampler.device)


def _placement(config: JobConfig, nodes: Sequence[Node]) -> Iterator[str]:
    """Whether Ray can seat every actor: in sum, one by one, and all together under the strategies asked for."""
    groups = _groups(config)
    wanted = [one for _, bundles, _ in groups for one in bundles]
    has = _sum([node.resources for node in nodes])
    short = False
    for name in dict.fromkeys(name for one in wanted for name in one):
        if name.startswith("node:"):
            if name not in has:
                short = True
                known = ", ".join(node.name for node in nodes)
                yield f"learner.nodes, sampler.nodes: no node {name.removeprefix('node:')!r} here; there is {known}"
            continue
        asked = sum(one.get(name, 0.0) for one in wanted)
        if asked > has.get(name, 0.0) + 1e-9:
            short = True
            yield _shortfall(config, name, asked, has.get(name, 0.0))
    if short:
        return
    for who, bundles, strategy in groups:
        for one in bundles:
            if not any(_fits(one, node.resources) for node in nodes):
                short = True
                yield f"no single node can hold one {who}, which asks for {amounts(one)}; largest: {_largest(nodes)}"
                break
        if strategy == "STRICT_SPREAD" and len(bundles) > len(nodes):
            short = True
            yield (
                f"{who}: placement STRICT_SPREAD wants {len(bundles)} nodes, there are {len(nodes)}; use SPREAD, or "
                f"num_workers={len(nodes)}"
            )
        together = _sum(bundles)
        if strategy == "STRICT_PACK" and not any(_fits(together, node.resources) for node in nodes):
            short = True
            yield f"{who}: STRICT_PACK wants {amounts(together)} on one node; largest: {_largest(nodes)}; use PACK"
    if not short and not _packs(wanted, nodes):
        yield (
            f"the nodes have enough in sum, but not in these pieces: {'; '.join(amounts(one) for one in wanted)}; "
            f"nodes: "
            f"{'; '.join(amounts(node.resources) for node in nodes)}. Ask for smaller parts or fewer workers"
        )


def _groups(config: JobConfig) -> list[tuple[str, list[dict[str, float]], str]]:
    """(who, what each asks for, strategy) of each placement group."""
    learner, sampler = config.learner, config.sampler
    ranks = [needs(learner, i) for i in range(learner.num_workers)]
    samplers = [needs(sampler, i) for i in range(sampler.num_workers)]
    if sampler.colocate:  # their shares of the GPU add up to it, as the placement asks for them; they take turns
        pairs = [_sum([rank, one]) for rank, one in zip(ranks, samplers, strict=True)]
        return [("learner rank with its sampler", pairs, learner.placement)]
    return [("learner rank", ranks, learner.placement), ("sampler", samplers, sampler.placement)]


def _shortfall(config: JobConfig, name: str, asked: float, found: float) -> str:
    learner, sampler = config.learner, config.sampler
    key = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(name, "resources")
    each = (needs(learner, 0).get(name, 0.0), needs(sampler, 0).get(name, 0.0))
    text = (
        f"{asked:g} {name} asked for, {found:g} found, {asked - found:g} too few: learner.num_workers "
        f"{learner.num_workers} x learner.{key} {each[0]:g} + sampler.num_workers {sampler.num_workers} x "
        f"sampler.{key} {each[1]:g}"
    )
    workers = learner.num_workers + sampler.num_workers
    if name == "CPU" and found > 0:
        share = math.floor(found / workers * 100) / 100
        return f"{text}. Parts of a core are allowed: learner.num_cpus={share:g} sampler.num_cpus={share:g}"
    if name == "GPU" and found == 0:
        return f"{text}. Without GPUs: learner.device=cpu learner.num_gpus=0 sampler.num_gpus=0"
    return f"{text}. Ask for less, or join a larger cluster (cluster.address)"


def _packs(wanted: Sequence[Mapping[str, float]], nodes: Sequence[Node]) -> bool:
    """Whether first-fit decreasing seats all."""
    free = [dict(node.resources) for node in nodes]
    for one in sorted(wanted, key=lambda one: (one.get("GPU", 0.0), one.get("CPU", 0.0)), reverse=True):
        room = next((has for has in free if _fits(one, has)), None)
        if room is None:
            return False
        for name, amount in one.items():
            room[name] = room.get(name, 0.0) - amount
    return True


def _memory(config: JobConfig, rows: Sequence[Row], nodes: Sequence[Node]) -> Iterator[str]:
    asked, found = _host_bytes(config, rows), sum(node.memory for node in nodes)
    if asked > found:
        each = " + ".join(f"{row.count} x {row.role} {gib(row.host_bytes)}" for row in rows)
        yield (
            f"memory: {gib(asked)} predicted, {gib(found)} found, {gib(asked - found)} too few: {each} + the rest. "
            "Lower learner.token_budget, learner.logprob_chunk_tokens, sampler.kv_cache_gb or sampler.max_num_seqs"
        )
    for row in rows:
        if row.host_bytes > max(node.memory for node in nodes):
            yield f"memory: no node has the {gib(row.host_bytes)} predicted for one {row.role}"


def _host_bytes(config: JobConfig, rows: Sequence[Row]) -> int:
    graders = config.rewards.workers * LIGHT_MEMORY["grader process"]
    store = int(config.cluster.object_store_gb * GIB)
    rest = LIGHT_MEMORY["rewards"] + LIGHT_MEMORY["advantages"] + graders + DRIVER_MEMORY
    return sum(row.count * row.host_bytes for row in rows) + rest + store


def _token_budget(config: JobConfig, dims: ModelShape, nodes: Sequence[Node]) -> int | None:
    """The largest power of two whose learner fits beside everything else; never more than a step's tokens."""

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
        if micro_batch_tokens(with_budget(budget)) < budget:  # the whole batch is one micro-batch already
            break
        budget *= 2
    return best


def _warnings(config: JobConfig, dims: ModelShape, nodes: Sequence[Node]) -> Iterator[str]:
    """What works, but worse than it could."""
    learner, sampler, lora = config.learner, config.sampler, config.lora
    completions = config.rl.problems_per_step * config.rl.samples_per_problem
    each = math.ceil(completions / sampler.num_workers)
    if sampler.max_num_seqs < each:
        yield (
            f"sampler.max_num_seqs {sampler.max_num_seqs} is below the {each} completions of a step per sampler, which "
            f"then come in waves; sampler.max_num_seqs={each} samples them at once"
        )
    running = sampled_at_once(config)
    wanted = running * config.model.max_length * kv_bytes_per_token(config, dims)
    if config.sampler_device == "cpu" and wanted > sampler.kv_cache_gb * GIB:
        yield (
            f"sampler.kv_cache_gb {sampler.kv_cache_gb:g} does not hold {running} sequences of model.max_length "
            f"{config.model.max_length}: some would be computed twice; sampler.kv_cache_gb={math.ceil(wanted / GIB)}"
        )
    yield from gpu_warnings(config, dims, _gpu_bytes(nodes))
    room = config.model.max_length - max(config.rl.sampling.max_tokens, config.eval.max_tokens)
    if room < SHORT_PROMPT_TOKENS:
        yield (
            f"model.max_length {config.model.max_length} leaves {room} tokens for a prompt; a longer prompt stops the "
            f"run; set model.max_length={config.model.max_length + SHORT_PROMPT_TOKENS} or more"
        )
    width = slot_width(sampler)
    if width > 2 * lora.rank:
        yield (
            f"sampler.max_lora_rank {sampler.max_lora_rank} makes slots of width {width} for adapters of lora.rank "
            f"{lora.rank}; sampler.max_lora_rank={lora.rank} saves memory and time"
        )
    smallest = min(min(pair) for pair in (*dims.attention.values(), *dims.mlp.values()))
    if lora.rank > smallest:
        yield f"lora.rank {lora.rank} is above the smallest side of the matrices, {smallest}; lora.rank={smallest}"
    if computing_dtype(config.model.dtype, learner.device) != config.model.dtype:
        yield (
            f"model.dtype {config.model.dtype}: torch has no kernels for it on a CPU like this one's, so the learner "
            "computes in float32 with weights rounded to it; model.dtype=float32 costs it nothing more"
        )
    if sampler.enforce_eager and config.sampler_device == "cuda":
        yield "sampler.enforce_eager on a GPU: decoding without CUDA graphs is slow; sampler.enforce_eager=false"
    optim, steps = config.rl.optim, config.rl.steps
    if optim.schedule != "constant" and optim.final_share == 0 and (optim.decay_steps or steps) < steps:
        yield (
            f"rl.optim.decay_steps {optim.decay_steps}: the learning rate is 0 after step {optim.decay_steps}, and "
            f"rl.steps {steps} goes on; set rl.optim.final_share, or rl.optim.decay_steps={steps}"
        )
    if learner.num_workers > completions:
        yield f"learner.num_workers {learner.num_workers}: a step has {completions} sequences, so some ranks idle"
    # One learner and one sampler that take turns may each use the cores of both.
    turns = config.overlap.max_policy_lag is None and learner.num_workers == sampler.num_workers == 1
    lent = {"learner": sampler.num_cpus, "sampler": learner.num_cpus} if turns else {}
    for who, section in (("learner", learner), ("sampler", sampler)):
        if section.threads > max(1.0, section.num_cpus + lent.get(who, 0.0)):
            yield (
                f"{who}.threads {section.threads} is more than {who}.num_cpus {section.num_cpus:g}: they compete for "
                f"cores that Ray gives to others; {who}.num_cpus={section.threads}"
            )
    memory = learner_memory(config, dims).peak
    logits = memory.parts.get("logits and working space", 0)
    if learner.logprob_chunk_tokens > 128 and 2 * logits > memory.total:
        yield (
            f"learner.logprob_chunk_tokens {learner.logprob_chunk_tokens}: logits are more than half of the learner's "
            f"{gib(memory.total)}; learner.logprob_chunk_tokens={learner.logprob_chunk_tokens // 4} saves most of it"
        )
    if any(row.on_gpu for row in _rows(config, dims)) and all(node.gpu_memory is None for node in nodes):
        yield "the memory of the GPUs is not known here, so it is compared with nothing"


def amounts(amounts: Mapping[str, float]) -> str:
    """Countable resources in words."""
    shown = {
        name: amount
        for name, amount in amounts.items()
        if not name.startswith(("node:", "memory", "object_store_memory", "accelerator_type"))
    }
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"


def _gpu_bytes(nodes: Sequence[Node]) -> int | None:
    """Of the largest GPU; None where nobody tells."""
    return max((node.gpu_memory for node in nodes if node.gpu_memory is not None), default=None)


def _largest(nodes: Sequence[Node]) -> str:
    return amounts(
        max(nodes, key=lambda node: (node.resources.get("GPU", 0.0), node.resources.get("CPU", 0.0))).resources
    )


def _fits(wanted: Mapping[str, float], has: Mapping[str, float]) -> bool:
    return all(has.get(name, 0.0) + 1e-9 >= amount for name, amount in wanted.items())


def _sum(amounts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(one.get(name, 0.0) for one in amounts) for one in amounts for name in one}
