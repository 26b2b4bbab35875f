"""Predicts the memory of each role from the model's shape and the job: the growth of a process beyond its imports.

A role passes through phases (loading, updating, ...). Each phase is a sum of named parts, and the role's peak is its
largest phase. The tensors that autograd saves were listed with ``torch.autograd.graph.saved_tensors_hooks``;
benchmarks/memory.py compares predictions with runs. T: tokens of a packed micro-batch, V: vocabulary size, r: rank of
the adapter. All sizes are bytes.
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
from rlsys.config import JobConfig, LoraSection, ModelSection, SamplerSection
from rlsys.utils.env_variables import set_default

MIB, GIB = 2**20, 2**30
FP32 = 4
LOGIT_BYTES = 64 * MIB  # largest chunk of logits, for any vocabulary
LOGIT_BLOCK = 262_144  # softmax values per block of a CPU thread
CANARY_TOKENS = 1536  # length of the long canary (rlsys/weight_sync/canary.py), scored by a learner in eager attention
CANARY_ROWS = 80  # canary positions that a sampler scores in one step
CPU_BLOCK_TOKENS = 32  # of the KV cache: the smallest block of vLLM's CPU attention; vLLM's own default is 128
KV_CACHE_FILLS = 2  # sequences that run, and as many that ended, whose prefixes can be used again
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # slot widths that vLLM offers

# Below a threshold glibc allocates blocks from a heap, which fragments; above it with mmap, whose pages are returned
# when a block is freed. glibc raises the threshold by itself, up to 32 MiB. With that a learner of 54M parameters grew
# to 2933 MiB; with a threshold of 4 MiB to 1834, and with 1 MiB to 1509, the size of its live tensors. mmap costs page
# faults: updates of a 0.4M model took 12 to 24 % longer with 4 MiB, so small models keep glibc's threshold. An update
# of SmolLM2-135M takes 19.1 s of CPU time with 1 MiB and 15.8 with 8, at a peak of 2652 and 3173 MiB
# (`python -m benchmarks.heap`, docs/performance.md): learners take 8, and engines, which allocate little in a decoding
# step, take 1.
MMAP_THRESHOLD, ENGINE_MMAP_THRESHOLD, SMALL_HIDDEN = 8 * MIB, MIB, 256
M_MMAP_THRESHOLD = -3  # malloc.h
# oneDNN caches one kernel per shape of matrix product, up to 1,024 kernels of about 0.5 MiB, and torch caches the
# objects that call them. Each new number of rows needs new kernels, and the steps of an engine and the micro-batches
# of a bfloat16 learner rarely repeat a number of rows: both grew by 500 to 700 MiB over a run. Recompiling the kernels
# costs 4 ms per decoding step of a 135M model, which takes 30 to 80 ms. So larger models cache 64 kernels, more than a
# layer needs forward and backward, and small models keep the default.
KERNEL_CACHES, KEPT_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 64
LEARNER_KERNELS, ENGINE_KERNELS = 80 * MIB, 40 * MIB  # measured with 64; float32 products of a learner use MKL
HEAP_SLACK = 1.4  # heap size / live blocks in the heap; measured
HEAP_SLACK_OF_SMALL = 3.2  # with glibc's threshold; fitted to the quickstart, the only such model that was measured

# Growth of a process that does not depend on the model: thread pools, kernels compiled at first use, Ray's buffers.
LEARNER_RUNTIME = 40 * MIB
SAMPLER_RUNTIME = 60 * MIB  # the actor and its engine together

# GPU memory of a process that does not depend on the model. Assumed, not measured: users of vLLM report 0.3 to 0.5 GiB
# for a context with the workspaces of cuBLAS, and vLLM logs 0.4 to 0.6 GiB for CUDA graphs of a few dozen batch sizes.
CUDA_CONTEXT, CUDA_GRAPHS = 512 * MIB, GIB

# Measured resident sizes: of the learner process after its imports, of the reward and the advantage actor in total. The
# grader process and the driver are estimates. Of a sampler on CPU the shares (PSS) of its three processes, because the
# engine is forked from the host process and shares pages with it: 201 MiB for the actor at the end of a job, of which
# torch is half, and 735 MiB for host and engine without weights and KV cache.
IMPORTS = {"learner": 460 * MIB, "sampler": 940 * MIB}
LIGHT_MEMORY = {"rewards": 470 * MIB, "advantages": 110 * MIB, "grader process": 60 * MIB}
DRIVER_MEMORY = 600 * MIB  # the command and Ray's processes

Blocks = list[tuple[int, float]]  # (number of tensors, bytes per token of each)


@dataclass(frozen=True, slots=True)
class Phase:
    """Memory in one phase of a role, by part."""

    name: str
    parts: Mapping[str, int]  # bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """Memory of one actor and its engine in each phase, without imports."""

    role: str
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def learner_memory(config: JobConfig, dims: ModelShape) -> RoleMemory:
    """Memory of one learner rank: loading, comparing, updating, saving; training the base with `model.make`."""
    phases = [_supervised(config, dims)] if config.model.make else []
    phases += [_loading(config, dims), _comparing(config, dims), _updating(config, dims), _saving(config, dims)]
    if config.learner.device == "cpu" and mmap_threshold(dims.hidden_size) == math.inf:
        phases = [_with_fragmentation(phase) for phase in phases]
    return RoleMemory("learner", tuple(phases))


def _with_fragmentation(phase: Phase) -> Phase:
    """The phase with the fragmentation of glibc's heap. Large blocks, such as logits, are not in the heap."""
    kept = int((HEAP_SLACK_OF_SMALL - 1) * phase.parts.get("activations", 0))
    return Phase(phase.name, {**phase.parts, "heap fragmentation": kept})


def sampler_memory(config: JobConfig, dims: ModelShape) -> RoleMemory:
    """Memory of one sampler; on a GPU without its KV cache, which takes the rest of gpu_memory_utilization."""
    size = _engine_bytes(config)
    weights = dims.parameters * size
    passing = {"activations": _engine_activations(config, dims), "logits": _engine_logits(config, dims)}
    if config.sampler_device == "cuda":
        return RoleMemory("sampler", (Phase("serving", {**_kept_by_engine(config, dims), **passing}),))
    loading = Phase(
        "loading",
        {
            "weights": weights,
            "weight files": dims.parameters * dims.saved_bytes,
            "runtime": SAMPLER_RUNTIME,
        },
    )
    serving = Phase(
        "serving",
        {
            "weights": weights,
            # vLLM packs the embedding and the output layer, tied or not
            "packed embeddings": 2 * dims.embedding_parameters * size,
            "KV cache": kv_cache_bytes(config.sampler, config.model, dims),
            "LoRA slots": _slots(config, dims),
            **passing,
            "kernels": ENGINE_KERNELS if mmap_threshold(dims.hidden_size) < math.inf else 0,
            "runtime": SAMPLER_RUNTIME,
        },
    )
    return RoleMemory("sampler", (loading, serving))


def _kept_by_engine(config: JobConfig, dims: ModelShape) -> dict[str, int]:
    """GPU memory that one engine worker always holds, by part."""
    weights = dims.parameters * _engine_bytes(config) // config.sampler.tensor_parallel_size
    graphs = {} if config.sampler.enforce_eager else {"CUDA graphs": CUDA_GRAPHS}
    return {"weights": weights, "LoRA slots": _slots(config, dims), **graphs, "CUDA context": CUDA_CONTEXT}


def engine_asleep(config: JobConfig) -> int:
    """GPU memory of a sleeping engine: CUDA graphs and context, which vLLM cannot release."""
    return CUDA_CONTEXT + (0 if config.sampler.enforce_eager else CUDA_GRAPHS)


def engine_host_copy(config: JobConfig, dims: ModelShape) -> int:
    """Pinned host memory of a sleeping engine: weights and LoRA slots are copied there until it wakes up."""
    if not (config.sampler.colocate and config.sampler_device == "cuda"):
        return 0
    kept = _kept_by_engine(config, dims)
    return kept["weights"] + kept["LoRA slots"]


def learner_between_calls(config: JobConfig, dims: ModelShape) -> int:
    """GPU memory of a learner rank between its calls."""
    return sum(_weights(config, dims).values()) + sum(_trained(config, dims).values()) + CUDA_CONTEXT


def adapter_parameters(lora: LoraSection, dims: ModelShape) -> int:
    """Number of LoRA parameters of one run."""
    attention = dims.num_layers * _sides(dims.attention) if lora.train_attn else 0
    mlp = (dims.num_layers - dims.mixture_layers) * _sides(dims.mlp) if lora.train_mlp else 0
    ends = dims.hidden_size + dims.vocab_size if lora.train_unembed else 0
    return lora.rank * (attention + mlp + ends)


def _sides(linears: Mapping[str, tuple[int, int]]) -> int:
    """LoRA parameters per unit of rank on all these linear modules: inputs + outputs."""
    return sum(inputs + outputs for inputs, outputs in linears.values())


def micro_batch_tokens(config: JobConfig) -> int:
    """T of the largest micro-batch of one rank: the token budget, unless the batch is smaller or one sequence is longer
    than the budget."""
    sequences = config.rl.problems_per_step * config.rl.samples_per_problem
    longest = config.model.max_length - 1
    share = math.ceil(sequences / config.learner.num_workers) * longest
    return min(max(config.learner.token_budget, longest), share)


def activations(config: JobConfig, dims: ModelShape, tokens: int) -> int:
    """Bytes that autograd saves for the backward pass of `tokens` packed tokens."""
    attention = _resident(config, dims, _attention_blocks(config, dims), tokens)
    mlp = _resident(config, dims, _mlp_blocks(config, dims), tokens)
    mixture = _resident(config, dims, _mixture_blocks(config, dims), tokens)
    ends = _resident(config, dims, _end_blocks(config, dims), tokens)
    if not config.learner.gradient_checkpointing:
        mlps = (dims.num_layers - dims.mixture_layers) * mlp + dims.mixture_layers * mixture
        return dims.num_layers * attention + mlps + ends
    inputs = _resident(config, dims, [(1, _computed_bytes(config) * dims.hidden_size)], tokens)
    largest = max(mlp, mixture) if dims.mixture_layers else mlp
    return dims.num_layers * inputs + attention + largest + ends  # the backward pass recomputes one layer at a time


def working(config: JobConfig, dims: ModelShape, tokens: int) -> int:
    """Temporary bytes: the larger of logits (end of the forward pass) and MLP (start of the backward pass)."""
    of_mlp = _resident(config, dims, [(3, FP32 * dims.intermediate_size)], tokens)
    return max(_head_bytes(config, dims, tokens), of_mlp)


def mmap_threshold(hidden_size: int) -> float:
    """Block size in bytes from which a learner allocates with mmap; infinite for small models, which keep glibc's
    threshold."""
    return math.inf if hidden_size < SMALL_HIDDEN else MMAP_THRESHOLD


def bound_growth(hidden_size: int, threshold: int = MMAP_THRESHOLD) -> None:
    """Set this process's mmap threshold and kernel caches as the predictions assume, so that it does not grow over a
    run. Call before the first matrix product. Keeps caches that the user has set, and does nothing to C libraries other
    than glibc."""
    if mmap_threshold(hidden_size) < math.inf:
        for name in KERNEL_CACHES:
            set_default(name, str(KEPT_KERNELS))
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, threshold)


def kv_bytes_per_token(model: ModelSection, dims: ModelShape, device: str) -> int:
    return 2 * dims.num_layers * dims.kv_size * _bytes_on(device, model)


def kv_cache_bytes(section: SamplerSection, model: ModelSection, dims: ModelShape) -> int:
    """KV cache of an engine on a CPU, whose workers share it and fill it with zeros when they start. Beyond
    KV_CACHE_FILLS times what `max_num_seqs` sequences of full length need, more would not be used."""
    tokens = math.ceil((model.max_length + 1) / CPU_BLOCK_TOKENS) * CPU_BLOCK_TOKENS
    copies = max(1, section.tensor_parallel_size // dims.num_kv_heads)  # of a head, on so many workers
    needed = section.max_num_seqs * tokens * copies * kv_bytes_per_token(model, dims, "cpu")
    return min(int(section.kv_cache_gb * GIB), KV_CACHE_FILLS * needed)


def slot_width(section: SamplerSection) -> int:
    """Rank for which the engine allocates one LoRA slot."""
    return next((rank for rank in ENGINE_RANKS if rank >= section.max_lora_rank), section.max_lora_rank)


def _resident(config: JobConfig, dims: ModelShape, blocks: Blocks, tokens: int) -> int:
    """Bytes of all `blocks` for `tokens` tokens, with the heap's slack for small blocks."""
    threshold = mmap_threshold(dims.hidden_size)
    limit = threshold if config.learner.device == "cpu" and threshold < math.inf else 0
    return int(sum(count * tokens * width * (HEAP_SLACK if tokens * width < limit else 1.0) for count, width in blocks))


def _engine_bytes(config: JobConfig) -> int:
    """Bytes per value in a sampler's engine."""
    return _bytes_on(config.sampler_device, config.model)


def _computed_bytes(config: JobConfig) -> int:
    """Bytes per value of the base's layers in the learner."""
    return _bytes_on(config.learner.device, config.model)


def _bytes_on(device: str, model: ModelSection) -> int:
    return SAVED_BYTES[computing_dtype(model.dtype, device)]


def _attention_blocks(config: JobConfig, dims: ModelShape) -> Blocks:
    """Tensors that autograd saves of one layer, without its MLP. They are in the compute dtype, except for the fp32
    row statistics of norms and attention.

    Attention saves q, k, v and its output, and q and k before their norms too. Norms save their inputs. Adapters save
    their inputs (the norms' outputs) and x A'.
    """
    lora, size = config.lora, _computed_bytes(config)
    hidden, query, kv = dims.hidden_size, dims.query_size, dims.kv_size
    of_norms = FP32 if dims.family.wide_norms else size
    small = FP32 * (2 * dims.num_heads + dims.num_kv_heads + dims.family.norms)
    blocks: Blocks = [(2, size * query), (2, size * kv), (dims.family.norms, of_norms * hidden), (1, small)]
    if dims.family.head_norms != "none":
        blocks += [(1, of_norms * query), (1, of_norms * kv)]
    if "qkv_proj" in dims.attention:  # v is a view of the fused output, which is kept
        blocks += [(1, size * query), (1, size * kv)]
    if lora.train_attn:
        blocks += [(1, size * hidden), (len(dims.attention), size * lora.rank)]
    return blocks


def _mlp_blocks(config: JobConfig, dims: ModelShape) -> Blocks:
    """Tensors that autograd saves of one MLP: gate, silu(gate), up, and their product for the adapter on it."""
    lora, size = config.lora, _computed_bytes(config)
    blocks: Blocks = [(3, size * dims.intermediate_size)]
    if lora.train_mlp:
        blocks += [(1, size * dims.hidden_size), (1, size * dims.intermediate_size), (len(dims.mlp), size * lora.rank)]
    return blocks


def _mixture_blocks(config: JobConfig, dims: ModelShape) -> Blocks:
    """Tensors that autograd saves of the experts of a token: as `_mlp_blocks`, and each expert's output."""
    size, times = _computed_bytes(config), dims.experts_per_token
    of_activation = 6 if dims.family.expert_biases else 3  # gpt-oss clamps gate and up, and adds one to up
    return [(times * of_activation, size * dims.expert_size), (times, size * dims.hidden_size)]


def _end_blocks(config: JobConfig, dims: ModelShape) -> Blocks:
    """Tensors saved outside of the layers: input of the last norm, gradient of the output layer, rotary embeddings."""
    size = _computed_bytes(config)
    return [(2, size * dims.hidden_size), (2, size * dims.head_dim)]


def _head_bytes(config: JobConfig, dims: ModelShape, tokens: int) -> int:
    """Bytes of a chunk of logits and of the fp32 blocks of its softmax. If the output layer is trained, also of the
    copies for its backward pass."""
    size, chunk = _computed_bytes(config), config.learner.logprob_chunk_tokens
    rows = max(1, min(chunk, tokens, LOGIT_BYTES // (dims.vocab_size * size)))
    copies = 5 if config.lora.train_unembed else 1
    return copies * size * rows * dims.vocab_size + 2 * FP32 * LOGIT_BLOCK * (config.learner.threads or 1)


def _weights(config: JobConfig, dims: ModelShape) -> dict[str, int]:
    """Frozen base on one rank. A sharded base also holds the unsharded embeddings and two unsharded layers while it
    computes."""
    size, ranks = _computed_bytes(config), config.learner.num_workers
    if not (config.learner.shard_base and ranks > 1):
        return {"weights": dims.parameters * size}
    gathered = 2 * dims.layer_parameters + dims.parameters - dims.num_layers * dims.layer_parameters
    return {"weights": dims.parameters * size // ranks, "gathered weights": gathered * size}


def _loading(config: JobConfig, dims: ModelShape) -> Phase:
    """Weights are views of the memory-mapped files if the dtype is that of the files, otherwise converted copies."""
    size, files = _computed_bytes(config), dims.parameters * dims.saved_bytes
    parts = {"weights": dims.parameters * size}
    if size != dims.saved_bytes:
        parts["weight files"] = files
    if config.model.make:
        parts["packed base"] = 2 * files  # the object in Ray's store and a copy of it
    return Phase("loading", parts | _runtime(config))


def _comparing(config: JobConfig, dims: ModelShape) -> Phase:
    """Scoring the long canary with transformers' eager attention: one layer's scores, masked scores and
    probabilities."""
    size, tokens = _computed_bytes(config), min(CANARY_TOKENS, config.model.max_length)
    scores = dims.num_heads * tokens * tokens * (3 * size + FP32)
    head = _head_bytes(config, dims, tokens)
    parts = {**_weights(config, dims), "scores": scores, "logits and workspace": head, **_runtime(config)}
    return Phase("scoring the canary", parts)


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
            "logits and workspace": working(config, dims, tokens),
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
    """A checkpoint packs the adapter and AdamW's moments; a snapshot for samplers is smaller."""
    packed = 2 * 3 * FP32 * adapter_parameters(config.lora, dims)
    return Phase("saving", {**_weights(config, dims), **_trained(config, dims), "packed": packed, **_runtime(config)})


def _supervised(config: JobConfig, dims: ModelShape) -> Phase:
    """Training a base from scratch: all weights in fp32 with gradients; Muon keeps one moment per matrix, AdamW two."""
    assert config.model.make
    section, weights = config.model.make.supervised, FP32 * dims.parameters
    linears = (*dims.attention.values(), *dims.mlp.values())
    matrices = dims.num_layers * sum(inputs * outputs for inputs, outputs in linears)
    tokens = min(
        max(config.learner.token_budget, config.model.max_length), section.batch_size * config.model.max_length
    )
    chunk = min(tokens, config.learner.logprob_chunk_tokens)
    of_mlp = _resident(config, dims, [(3, FP32 * dims.intermediate_size)], tokens)
    return Phase(
        "training the base",
        {
            "weights": weights,
            "gradients": weights,
            "optimizer": 2 * weights - FP32 * matrices,
            "activations": activations(config, dims, tokens),  # linear modules save their inputs, as adapters do
            "logits and workspace": max(3 * FP32 * chunk * dims.vocab_size, of_mlp),
            **_runtime(config),
        },
    )


def _slots(config: JobConfig, dims: ModelShape) -> int:
    """The engine's LoRA slots: they have the largest rank allowed and cover every linear module, trained or not."""
    section, size = config.sampler, _engine_bytes(config)
    layers = dims.num_layers * _sides(dims.attention) + (dims.num_layers - dims.mixture_layers) * _sides(dims.mlp)
    on_output = unembedding_problem(dims.vocab_size, dims.family, config.sampler_device) is None
    ends = dims.hidden_size + dims.vocab_size if on_output else 0
    slots = section.max_live_adapters * slot_width(section) * (layers + ends)
    return size * (slots + section.max_live_adapters * adapter_parameters(config.lora, dims))


def sampled_at_once(config: JobConfig) -> int:
    """Sequences in one decoding step of one sampler, at most: an evaluation runs beside the next step's sampling."""
    completions = config.rl.problems_per_step * config.rl.samples_per_problem
    held_out = config.task.eval_problems or config.sampler.max_num_seqs  # None: all of the split, of unknown size
    wanted = completions + held_out * max(1, config.eval.samples)
    return min(config.sampler.max_num_seqs, math.ceil(wanted / config.sampler.num_workers))


def _engine_activations(config: JobConfig, dims: ModelShape) -> int:
    """Activations of one layer during a prefill; without a backward pass only one layer's exist at a time."""
    tokens = max(config.sampler.max_num_batched_tokens, config.model.max_length + 1)
    widest = 3 * dims.intermediate_size + 4 * dims.hidden_size
    return _engine_bytes(config) * tokens * widest


def _engine_logits(config: JobConfig, dims: ModelShape) -> int:
    """Logits, their fp32 log-softmax, and one byte per value for computing ranks; on a GPU also sampling noise."""
    copies = 2 * FP32 + 1 + (0 if _engine_bytes(config) == FP32 else 2)
    copies += 2 * FP32 if config.sampler_device == "cuda" else 0
    return max(sampled_at_once(config), min(CANARY_ROWS, config.sampler.max_num_seqs)) * dims.vocab_size * copies
