"""Predicted memory of each role, from a model's dimensions and a job: how far a process grows beyond its imports.

A role passes through phases (loading, updating, ...), each a sum of named parts; its peak is the largest phase. What
autograd keeps was read off ``torch.autograd.graph.saved_tensors_hooks``; benchmarks/memory.py compares predictions
with runs. T tokens are in a packed micro-batch, V is the vocabulary, r the adapter's rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlsys.architectures.model_shape import SAVED_BYTES, ModelShape
from rlsys.architectures.precision import computing_dtype
from rlsys.architectures.support import unembedding_problem
from rlsys.config import JobConfig, LoraSection, SamplerSection
from rlsys.utils.env_variables import set_default

MIB, GIB = 2**20, 2**30
FP32 = 4
LOGIT_BYTES = 64 * MIB  # of a chunk of logits, whatever the vocabulary
LOGIT_BLOCK = 262_144  # values of the softmax that a thread of a CPU works on at once
CANARY_TOKENS = 1536  # of the long canary (rlsys/weight_sync/canary.py), which a learner scores by eager attention
CANARY_ROWS = 80  # of its positions, which a sampler scores at once
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # slot widths that vLLM offers

# glibc serves smaller blocks from a heap that is left in pieces, larger ones by pages that go back at once. Its own
# limit moves up to 32 MiB: a learner of 54M parameters then grew to 2933 MiB, with 4 MiB to 1834, with 1 MiB to 1509,
# which is what it holds. Page faults cost: updates of a 0.4M model took 12 to 24 % longer with 4 MiB, so small models
# keep glibc's own limit; in larger ones the matrix products outweigh them.
MMAP_THRESHOLD, SMALL_HIDDEN = MIB, 256
M_MMAP_THRESHOLD = -3  # malloc.h
# oneDNN keeps a kernel of each shape of matrix product, 1,024 of them, each about 0.5 MiB of code and data, and torch
# keeps what calls them in a cache of its own. A new number of rows needs new ones, and the steps of an engine and the
# micro-batches of a bfloat16 learner rarely have the same: either grew by 500 to 700 MiB over a run. Made anew they
# cost 4 ms where a decoding step of a 135M model takes 30 to 80 ms; small models keep all of them. A layer needs fewer
# than 64 forward and backward.
KERNEL_CACHES, KEPT_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 64
LEARNER_KERNELS, ENGINE_KERNELS = 80 * MIB, 40 * MIB  # of so many; measured. Products in float32 are MKL's in a learner
HEAP_SLACK = 1.4  # of what is served from the heap; measured
HEAP_SLACK_OF_SMALL = 3.2  # where glibc decides; fitted to the quickstart, the only such model that was measured

# What a process grows by whatever it holds: thread pools, kernels that are made at first use, Ray's own buffers.
LEARNER_RUNTIME = 40 * MIB
SAMPLER_RUNTIME = 60 * MIB  # the actor and its engine together

# What a process on a GPU takes whatever it holds. Assumed, not measured: reports of vLLM users give 0.3 to 0.5 GiB for
# a context with the workspaces of cuBLAS, and its logs 0.4 to 0.6 GiB for CUDA graphs of a few dozen batch sizes.
CUDA_CONTEXT, CUDA_GRAPHS = 512 * MIB, GIB

# Measured resident sizes of processes that have imported what their role imports, and of rewards and advantages whole;
# a grader process and the driver are estimates.
IMPORTS = {"learner": 460 * MIB, "sampler": 1230 * MIB}  # the sampler's actor and its engine
LIGHT_MEMORY = {"rewards": 470 * MIB, "advantages": 110 * MIB, "grader process": 60 * MIB}
DRIVER_MEMORY = 600 * MIB  # the command itself and Ray's own processes

Blocks = list[tuple[int, float]]  # (how many, bytes per token of one)


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    parts: Mapping[str, int]  # bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """Of one actor with its engine, above imports."""

    role: str
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def learner_memory(config: JobConfig, dims: ModelShape) -> RoleMemory:
    """Of one rank."""
    phases = [_supervised(config, dims)] if config.model.make else []
    phases += [_loading(config, dims), _comparing(config, dims), _updating(config, dims), _saving(config, dims)]
    if config.learner.device == "cpu" and mmap_threshold(dims.hidden_size) == math.inf:
        phases = [_in_pieces(phase) for phase in phases]
    return RoleMemory("learner", tuple(phases))


def _in_pieces(phase: Phase) -> Phase:
    """With what glibc's heap keeps beside the blocks in use; large ones, such as logits, never are in it."""
    kept = int((HEAP_SLACK_OF_SMALL - 1) * phase.parts.get("activations", 0))
    return Phase(phase.name, {**phase.parts, "heap in pieces": kept})


def sampler_memory(config: JobConfig, dims: ModelShape) -> RoleMemory:
    """Of one sampler; on a GPU without its KV cache, which takes what gpu_memory_utilization leaves."""
    size = SAVED_BYTES[config.model.dtype]
    weights = dims.parameters * size
    passing = {"activations": _engine_activations(config, dims), "logits": _engine_logits(config, dims)}
    if config.sampler_device == "cuda":
        return RoleMemory("sampler", (Phase("serving", {**_kept_by_engine(config, dims), **passing}),))
    loading = Phase(
        "loading",
        {
            "weights": weights,
            "files of the weights": dims.parameters * dims.saved_bytes,
            "runtime": SAMPLER_RUNTIME,
        },
    )
    serving = Phase(
        "serving",
        {
            "weights": weights,
            "packed ends": 2 * dims.embedding_parameters * size,  # vLLM packs embedding and output layer, tied or not
            "KV cache": int(config.sampler.kv_cache_gb * GIB),
            "LoRA slots": _slots(config, dims),
            **passing,
            "kernels": ENGINE_KERNELS if mmap_threshold(dims.hidden_size) < math.inf else 0,
            "runtime": SAMPLER_RUNTIME,
        },
    )
    return RoleMemory("sampler", (loading, serving))


def _kept_by_engine(config: JobConfig, dims: ModelShape) -> dict[str, int]:
    """Of one worker on a GPU, whatever it is asked."""
    weights = dims.parameters * SAVED_BYTES[config.model.dtype] // config.sampler.tensor_parallel_size
    graphs = {} if config.sampler.enforce_eager else {"CUDA graphs": CUDA_GRAPHS}
    return {"weights": weights, "LoRA slots": _slots(config, dims), **graphs, "CUDA context": CUDA_CONTEXT}


def engine_asleep(config: JobConfig) -> int:
    """GPU memory that an engine keeps at sleep: graphs and context belong to no pool that vLLM can give back."""
    return CUDA_CONTEXT + (0 if config.sampler.enforce_eager else CUDA_GRAPHS)


def engine_host_copy(config: JobConfig, dims: ModelShape) -> int:
    """Pinned host memory of an engine that sleeps: weights and LoRA slots wait there until it wakes."""
    if not (config.sampler.colocate and config.sampler_device == "cuda"):
        return 0
    kept = _kept_by_engine(config, dims)
    return kept["weights"] + kept["LoRA slots"]


def learner_between_calls(config: JobConfig, dims: ModelShape) -> int:
    """GPU memory of a rank that is not at work."""
    return sum(_weights(config, dims).values()) + sum(_trained(config, dims).values()) + CUDA_CONTEXT


def adapter_parameters(lora: LoraSection, dims: ModelShape) -> int:
    """Of one run."""
    attention = dims.num_layers * _sides(dims.attention) if lora.train_attn else 0
    mlp = (dims.num_layers - dims.mixture_layers) * _sides(dims.mlp) if lora.train_mlp else 0
    ends = dims.hidden_size + dims.vocab_size if lora.train_unembed else 0
    return lora.rank * (attention + mlp + ends)


def _sides(linears: Mapping[str, tuple[int, int]]) -> int:
    """Of adapters of rank 1 on all of them."""
    return sum(inputs + outputs for inputs, outputs in linears.values())


def micro_batch_tokens(config: JobConfig) -> int:
    """T of the largest micro-batch of one rank: the budget, unless the batch is smaller or one sequence larger."""
    sequences = config.rl.problems_per_step * config.rl.samples_per_problem
    longest = config.model.max_length - 1
    share = math.ceil(sequences / config.learner.num_workers) * longest
    return min(max(config.learner.token_budget, longest), share)


def activations(config: JobConfig, dims: ModelShape, tokens: int) -> int:
    """What autograd keeps of `tokens` packed tokens until the backward pass has used it."""
    attention = _resident(config, dims, _attention_blocks(config, dims), tokens)
    mlp = _resident(config, dims, _mlp_blocks(config, dims), tokens)
    mixture = _resident(config, dims, _mixture_blocks(config, dims), tokens)
    ends = _resident(config, dims, _end_blocks(config, dims), tokens)
    if not config.learner.gradient_checkpointing:
        mlps = (dims.num_layers - dims.mixture_layers) * mlp + dims.mixture_layers * mixture
        return dims.num_layers * attention + mlps + ends
    inputs = _resident(config, dims, [(1, _computed_bytes(config) * dims.hidden_size)], tokens)
    largest = max(mlp, mixture) if dims.mixture_layers else mlp
    return dims.num_layers * inputs + attention + largest + ends  # one layer at a time is run again


def working(config: JobConfig, dims: ModelShape, tokens: int) -> int:
    """What exists for a moment at the end of the forward pass (logits) or early in the backward pass (MLP)."""
    of_mlp = _resident(config, dims, [(3, FP32 * dims.intermediate_size)], tokens)
    return max(_head_bytes(config, dims, tokens), of_mlp)


def mmap_threshold(hidden_size: int) -> float:
    """Bytes from which a learner's process asks the system for pages of their own; without end where glibc decides."""
    return math.inf if hidden_size < SMALL_HIDDEN else MMAP_THRESHOLD


def bound_growth(hidden_size: int) -> None:
    """Settle, for this process, what would let it grow over a run, as the predictions expect it. Call before its first
    matrix product. Another C library than glibc is left as it is, and so is a limit that the user has set."""
    if mmap_threshold(hidden_size) < math.inf:
        for name in KERNEL_CACHES:
            set_default(name, str(KEPT_KERNELS))
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def kv_bytes_per_token(config: JobConfig, dims: ModelShape) -> int:
    return 2 * dims.num_layers * dims.kv_size * SAVED_BYTES[config.model.dtype]


def slot_width(section: SamplerSection) -> int:
    """Of one LoRA slot of the engine."""
    return next((rank for rank in ENGINE_RANKS if rank >= section.max_lora_rank), section.max_lora_rank)


def _resident(config: JobConfig, dims: ModelShape, blocks: Blocks, tokens: int) -> int:
    """Bytes that blocks of so many tokens take, with the heap's slack where they are small."""
    threshold = mmap_threshold(dims.hidden_size)
    limit = threshold if config.learner.device == "cpu" and threshold < math.inf else 0
    return int(sum(count * tokens * width * (HEAP_SLACK if tokens * width < limit else 1.0) for count, width in blocks))


def _computed_bytes(config: JobConfig) -> int:
    """Of one number of the base's layers in the learner."""
    return SAVED_BYTES[computing_dtype(config.model.dtype, config.learner.device)]


def _attention_blocks(config: JobConfig, dims: ModelShape) -> Blocks:
    """Kept of one layer but its MLP, all in the dtype that is computed in but for norms' and attention's figures per
    row.

    Attention keeps q, k, v and its output, q and k also from before their norms; the norms of the layer keep their
    inputs and the adapters those norms' outputs; every adapter keeps x A'.
    """
    lora, size = config.lora, _computed_bytes(config)
    hidden, query, kv = dims.hidden_size, dims.query_size, dims.kv_size
    of_norms = FP32 if dims.family.wide_norms else size
    small = FP32 * (2 * dims.num_heads + dims.num_kv_heads + dims.family.norms)
    blocks: Blocks = [(2, size * query), (2, size * kv), (dims.family.norms, of_norms * hidden), (1, small)]
    if dims.family.head_norms != "none":
        blocks += [(1, of_norms * query), (1, of_norms * kv)]
    if "qkv_proj" in dims.attention:  # values are a view of what is kept whole
        blocks += [(1, size * query), (1, size * kv)]
    if lora.train_attn:
        blocks += [(1, size * hidden), (len(dims.attention), size * lora.rank)]
    return blocks


def _mlp_blocks(config: JobConfig, dims: ModelShape) -> Blocks:
    """Kept of one MLP: gate, silu(gate), up and their product, which an adapter reads."""
    lora, size = config.lora, _computed_bytes(config)
    blocks: Blocks = [(3, size * dims.intermediate_size)]
    if lora.train_mlp:
        blocks += [(1, size * dims.hidden_size), (1, size * dims.intermediate_size), (len(dims.mlp), size * lora.rank)]
    return blocks


def _mixture_blocks(config: JobConfig, dims: ModelShape) -> Blocks:
    """The same of each expert that a token goes to, and what comes out of it."""
    size, times = _computed_bytes(config), dims.experts_per_token
    of_activation = 6 if dims.family.expert_biases else 3  # gpt-oss clamps gate and up, and adds one to up
    return [(times * of_activation, size * dims.expert_size), (times, size * dims.hidden_size)]


def _end_blocks(config: JobConfig, dims: ModelShape) -> Blocks:
    """Kept outside of the layers: the last norm's input, the output layer's gradient, cosines and sines."""
    size = _computed_bytes(config)
    return [(2, size * dims.hidden_size), (2, size * dims.head_dim)]


def _head_bytes(config: JobConfig, dims: ModelShape, tokens: int) -> int:
    """A chunk of logits and the fp32 blocks that go through its softmax; where the layer is trained, what its backward
    pass keeps and makes of the chunk too."""
    size, chunk = _computed_bytes(config), config.learner.logprob_chunk_tokens
    rows = max(1, min(chunk, tokens, LOGIT_BYTES // (dims.vocab_size * size)))
    copies = 5 if config.lora.train_unembed else 1
    return copies * size * rows * dims.vocab_size + 2 * FP32 * LOGIT_BLOCK * config.learner.threads


def _weights(config: JobConfig, dims: ModelShape) -> dict[str, int]:
    """Of the frozen base on one rank; a sharded one has its two ends and two layers whole while it computes."""
    size, ranks = _computed_bytes(config), config.learner.num_workers
    if not (config.learner.shard_base and ranks > 1):
        return {"weights": dims.parameters * size}
    gathered = 2 * dims.layer_parameters + dims.parameters - dims.num_layers * dims.layer_parameters
    return {"weights": dims.parameters * size // ranks, "gathered weights": gathered * size}


def _loading(config: JobConfig, dims: ModelShape) -> Phase:
    """Weights are views of the mapped files where their type is the one wanted, else copies beside them."""
    size, files = _computed_bytes(config), dims.parameters * dims.saved_bytes
    parts = {"weights": dims.parameters * size}
    if size != dims.saved_bytes:
        parts["files of the weights"] = files
    if config.model.make:
        parts["packed base"] = 2 * files  # as Ray's object and as a copy of it
    return Phase("loading", parts | _runtime(config))


def _comparing(config: JobConfig, dims: ModelShape) -> Phase:
    """The long canary through transformers' eager attention: of one layer all scores, masked, and as probabilities."""
    size, tokens = _computed_bytes(config), min(CANARY_TOKENS, config.model.max_length)
    scores = dims.num_heads * tokens * tokens * (3 * size + FP32)
    head = _head_bytes(config, dims, tokens)
    parts = {**_weights(config, dims), "scores": scores, "logits and working space": head, **_runtime(config)}
    return Phase("scoring its canary", parts)


def _trained(config: JobConfig, dims: ModelShape) -> dict[str, int]:
    adapter = FP32 * adapter_parameters(config.lora, dims)
    flat = {"gradients of all ranks": adapter} if config.learner.num_workers > 1 else {}
    copies = int(config.rl.advantages.reference_refresh_steps > 0)
    copies += config.rl.loss.importance_cap is not None and config.rl.substeps > 1
    copied = {"copies of the adapter": copies * adapter} if copies else {}
    return {"adapter": adapter, "gradients": adapter, "AdamW": 2 * adapter, **flat, **copied}


def _updating(config: JobConfig, dims: ModelShape) -> Phase:
    tokens = micro_batch_tokens(config)
    return Phase(
        "updating",
        {
            **_weights(config, dims),
            **_trained(config, dims),
            "activations": activations(config, dims, tokens),
            "logits and working space": working(config, dims, tokens),
            **_kernels(config),
            **_runtime(config),
        },
    )


def _runtime(config: JobConfig) -> dict[str, int]:
    on_gpu = config.learner.device == "cuda"
    return {"CUDA context": CUDA_CONTEXT} if on_gpu else {"runtime": LEARNER_RUNTIME}


def _kernels(config: JobConfig) -> dict[str, int]:
    in_half = config.learner.device == "cpu" and _computed_bytes(config) < FP32
    return {"kernels": LEARNER_KERNELS} if in_half else {}


def _saving(config: JobConfig, dims: ModelShape) -> Phase:
    """A checkpoint packs adapter and moments; a snapshot for the samplers is smaller."""
    packed = 2 * 3 * FP32 * adapter_parameters(config.lora, dims)
    return Phase("saving", {**_weights(config, dims), **_trained(config, dims), "packed": packed, **_runtime(config)})


def _supervised(config: JobConfig, dims: ModelShape) -> Phase:
    """All weights in fp32 with gradients; muon keeps one moment of a matrix, AdamW two."""
    assert config.model.make
    section, weights = config.model.make.supervised, FP32 * dims.parameters
    linears = (*dims.attention.values(), *dims.mlp.values())
    matrices = dims.num_layers * sum(inputs * outputs for inputs, outputs in linears)
    single = matrices if section.optimizer == "muon" else 0
    tokens = min(
        max(config.learner.token_budget, config.model.max_length), section.batch_size * config.model.max_length
    )
    chunk = min(tokens, config.learner.logprob_chunk_tokens)
    of_mlp = _resident(config, dims, [(3, FP32 * dims.intermediate_size)], tokens)
    return Phase(
        "making the base",
        {
            "weights": weights,
            "gradients": weights,
            "optimizer": 2 * weights - FP32 * single,
            "activations": activations(config, dims, tokens),  # inputs of linears are kept as those of adapters are
            "logits and working space": max(3 * FP32 * chunk * dims.vocab_size, of_mlp),
            **_runtime(config),
        },
    )


def _slots(config: JobConfig, dims: ModelShape) -> int:
    """Slots are as wide as the widest adapter allowed and cover every linear module, trained or not."""
    section, size = config.sampler, SAVED_BYTES[config.model.dtype]
    layers = dims.num_layers * _sides(dims.attention) + (dims.num_layers - dims.mixture_layers) * _sides(dims.mlp)
    on_output = unembedding_problem(dims.vocab_size, dims.family, config.sampler_device) is None
    ends = dims.hidden_size + dims.vocab_size if on_output else 0
    slots = section.max_live_adapters * slot_width(section) * (layers + ends)
    return size * (slots + section.max_live_adapters * adapter_parameters(config.lora, dims))


def sampled_at_once(config: JobConfig) -> int:
    """Sequences of one decoding step of one sampler."""
    completions = config.rl.problems_per_step * config.rl.samples_per_problem
    held_out = config.task.eval_problems or config.sampler.max_num_seqs  # None: all there are, maybe as many as fit
    wanted = max(completions, held_out)
    return min(config.sampler.max_num_seqs, math.ceil(wanted / config.sampler.num_workers))


def _engine_activations(config: JobConfig, dims: ModelShape) -> int:
    """Of one layer during a prefill: nothing is kept for a backward pass."""
    tokens = max(config.sampler.max_num_batched_tokens, config.model.max_length + 1)
    widest = 3 * dims.intermediate_size + 4 * dims.hidden_size
    return SAVED_BYTES[config.model.dtype] * tokens * widest


def _engine_logits(config: JobConfig, dims: ModelShape) -> int:
    """The logits, their log-softmax in fp32, and a comparison of a byte each for the rank; on a GPU noise too."""
    copies = 2 * FP32 + 1 + (0 if config.model.dtype == "float32" else 2)
    copies += 2 * FP32 if config.sampler_device == "cuda" else 0
    return max(sampled_at_once(config), min(CANARY_ROWS, config.sampler.max_num_seqs)) * dims.vocab_size * copies
