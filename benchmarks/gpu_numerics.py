"""Compares the learner on `device` with float64 on the CPU, for every code path that only CUDA uses.

Bounds. fp32 rounds by 2^-24 = 6e-8, which gives about 1e-6 through a few layers forward and backward. The bound for
fp32 results is 2e-5 of the norm; for shared against unshared prompts, both in fp32, 1e-5. bfloat16 rounds each
intermediate result by up to 2^-9 = 2e-3. A layer has about forty rounded results forward and as many backward: seven
linear modules with A, B and x A' of their adapters, four norms, the rotation of q and k, probabilities and output of
attention, the gate and its product, residuals. If all rounding errors were maximal and independent, n layers would give
an error of sqrt(80 n) 2^-9 of a gradient. The bound is twice that, because they are not independent: 5 % for two
layers. On CUDA results are also compared with bfloat16 on the CPU, and shared with unshared prompts: neither may be
more than twice as far from float64.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_parts import (
    QUICK,
    QWEN3_0_6B,
    RUN,
    Check,
    LearnerValues,
    LoraValues,
    datums_of,
    error,
    groups,
    learner_of,
    near_policy,
    settle,
    update,
    write_base,
)
from benchmarks.shapes import TINY
from rlsys import losses
from rlsys.architectures.precision import multiplies_bfloat16
from rlsys.datums import DatumBatch
from rlsys.learner.learner import Learner
from rlsys.learner.packing import prefix_groups
from rlsys.learner.runs import RunState
from rlsys.modeling.attention import packed_attention
from rlsys.modeling.logprobs import token_logprobs
from rlsys.modeling.prefix_layout import ALONE, Segments
from rlsys.rollouts import spans
from rlsys.types import AdamParams, Array, Datum

POSITIONS = 1500
FP32, SHARED = 2e-5, 1e-5  # of the norm: against float64, and of sharing against not sharing
HALF = 2.0**-9  # a rounding to bfloat16
LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "cross_entropy")
SMOOTH = losses.resolve("importance_sampling")
EVERY_LINEAR = LoraValues(rank=8, alpha=16.0, train_unembed=True)
MAX_LENGTH = 2048


@dataclass
class Bench:
    """One batch on one small base, and learners on that base, each created once."""

    folder: Path
    device: str
    quick: bool
    _wanted: dict[tuple[str, str, float], tuple[Any, dict[str, Tensor]]] = field(default_factory=dict)

    @cached_property
    def shape(self) -> dict[str, Any]:
        return QUICK if self.quick else {**TINY, "tie_word_embeddings": False}

    @cached_property
    def base(self) -> Path:
        """In bfloat16, so that all precisions begin with the same weights."""
        write_base(self.folder / "base", self.shape, "bfloat16", "cpu", MAX_LENGTH, spread=0.08)
        return self.folder / "base"

    @cached_property
    def batch(self) -> DatumBatch:
        """Near the policy of `exact`. Groups with ragged completions, and two sequences that share nothing."""
        random = np.random.default_rng(0)
        prompts = np.array([40, 71, 128, 17, 9])
        most, sizes = (40, (3, 3, 2, 1, 1)) if self.quick else (90, (6, 6, 6, 1, 1))
        completions = [random.integers(1, most, n) for n in sizes]
        drawn = groups(prompts, completions, self.shape["vocab_size"])
        return near_policy(drawn, self.exact.forward(RUN, drawn, losses.resolve("cross_entropy")).logprobs)

    def made(self, device: str, dtype: torch.dtype, lora: LoraValues = EVERY_LINEAR) -> Learner:
        section = LearnerValues(device=device, threads=_threads())
        return learner_of(self.base, section, "bfloat16", MAX_LENGTH, dtype, lora)

    @cached_property
    def exact(self) -> Learner:
        """The reference: float64 on the CPU, one sequence at a time, all rows of logits at once."""
        learner = self.made("cpu", torch.float64)
        settle(learner, share_prompts=False, token_budget=1, logprob_chunk_tokens=1 << 20)
        return learner

    @cached_property
    def single(self) -> Learner:
        """What is checked, in fp32."""
        return self.made(self.device, torch.float32)

    @cached_property
    def half(self) -> Learner:
        """What is checked, in bfloat16, with the adapter in fp32."""
        return self.made(self.device, torch.bfloat16)

    def wanted(
        self, loss: losses.Loss, where: Literal["all", "weighted"] = "all", temperature: float = 1.0
    ) -> tuple[Any, dict[str, Tensor]]:
        """What `exact` computes, once for all the checks that compare with it."""
        if (key := (loss.name, where, temperature)) not in self._wanted:
            kept = {"share_prompts": False, "token_budget": 1, "logprob_chunk_tokens": 1 << 20}
            self._wanted[key] = update(self.exact, self.batch, loss, where, temperature, **kept)
        return self._wanted[key]


FIRST = ("positions", "packing", "sharing", "attention", "attention with windows")  # what matters most


def checks(bench: Bench) -> dict[str, Callable[[], Iterator[Check]]]:
    """Checks by name, in the order in which they run: FIRST, then the others."""
    of_bench = {
        "positions": lambda: positions(bench),
        "packing": lambda: packing(bench),
        "sharing": lambda: sharing(bench),
        "attention": lambda: attention(bench.device, bench.quick),
        "attention with windows": lambda: attention(
            bench.device, bench.quick, WINDOWS[1:2] if bench.quick else WINDOWS
        ),
        "precision of fp32 products": lambda: precision(bench.device),
        "half precision": lambda: half_precision(bench),
        "losses": lambda: of_losses(bench),
        "chunks": lambda: chunks(bench),
        "chunked log-probabilities alone": lambda: chunked_alone(bench.device, bench.quick),
        "logprobs": lambda: of_tokens(bench),
        "custom loss": lambda: custom(bench),
        "optim_step": lambda: steps(bench),
        "snapshot": lambda: snapshot(bench),
        "greedy": lambda: greedy(bench),
    }
    if "gradient_checkpointing" in LearnerValues.__dataclass_fields__:
        of_bench["gradient checkpointing"] = lambda: checkpointing(bench)
    if bench.device == "cuda":
        of_bench["out of memory"] = lambda: out_of_memory(bench)
    return of_bench


def positions(bench: Bench) -> Iterator[Check]:
    """The learner in bfloat16 on the device against the learner in float32 on the CPU, of one sequence.

    The shape is Qwen3-0.6B's, depth and vocabulary included (tiny with `quick`). A fault of positions or masks grows
    with the position, so each range of positions is held to the bound. Where the CPU has kernels for bfloat16, its own
    bfloat16 is the sharper yardstick: the device may be no more than twice as far from float32.
    """
    shape = QUICK if bench.quick else QWEN3_0_6B
    base = bench.folder / "positions"
    write_base(base, shape, "bfloat16", bench.device, MAX_LENGTH, spread=0.08 if bench.quick else 0.03)
    tokens = np.random.default_rng(3).integers(1, shape["vocab_size"], POSITIONS + 1).astype(np.int32)
    yardstick = bench.device != "cpu" and multiplies_bfloat16()
    sides = {"float32": ("cpu", torch.float32), "bfloat16": (bench.device, torch.bfloat16)}
    if yardstick:
        sides["bfloat16 of the CPU"] = ("cpu", torch.bfloat16)
    found = {name: _scored(base, tokens, *side) for name, side in sides.items()}
    bound = 2 * math.sqrt(80 * shape["num_hidden_layers"]) * HALF
    for run in ("base", "adapter"):
        wanted = found["float32"][run]
        gap = np.abs(found["bfloat16"][run] - wanted)
        for part in np.array_split(np.arange(POSITIONS), 6):
            name = f"bfloat16 against the CPU's float32, {run}, positions {part[0] + 1} to {part[-1] + 1}: mean, nats"
            yield Check(name, float(gap[part].mean()), bound * float(wanted.std()), note=f"max {gap[part].max():.3g}")
        if yardstick:
            ratio = gap.mean() / np.abs(found["bfloat16 of the CPU"][run] - wanted).mean()
            yield Check(f"bfloat16, {run}: the device's distance over the CPU's", float(ratio), 2.0)


def _scored(base: Path, tokens: Array, device: str, dtype: torch.dtype) -> dict[str, Array]:
    """(POSITIONS,) float64 log-probabilities of all tokens but the first, with the adapter and without."""
    section = LearnerValues(device=device, threads=_threads())
    learner = learner_of(base, section, "bfloat16", MAX_LENGTH, dtype, LoraValues(rank=8, alpha=16.0))
    ends = np.array([0, len(tokens)])
    runs = {"base": None, "adapter": RUN}
    return {name: learner.logprobs(run, tokens, ends)[1:].astype(np.float64) for name, run in runs.items()}


def precision(device: str) -> Iterator[Check]:
    """TF32, 2^-11 a factor, would show as 3e-4: every fp32 figure below would be of it."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    found = error([a.to(device) @ b.to(device)], [a.double() @ b.double()])
    yield Check("fp32 product is fp32, not TF32", found, 1e-5)


# Lengths of segments and what each reads. The kernel's tiles are 64 or 128 wide; a reader's causal diagonal ends at
# its last key, so a reader of another length than its keys tells bottom-right from top-left at once.
PACKS: dict[str, tuple[list[int], list[int]]] = {
    "sequences of 1 to 300": ([1, 64, 65, 127, 128, 129, 300, 2], [ALONE] * 8),
    "single tokens": ([1] * 9, [ALONE] * 9),
    "readers of a prompt": ([200, 5, 1, 64, 130, 33], [ALONE, 0, 0, 0, 0, ALONE]),
    "two groups": ([37, 5, 5, 128, 1, 70], [ALONE, 0, 0, ALONE, 3, 3]),
    "single tokens that read": ([65, 1, 1, 1], [ALONE, 0, 0, 0]),
}
WINDOWS = (1, 24, 100)
HEADS = [(4, 4, 64), (4, 2, 128), (8, 1, 32), (4, 2, 256), (6, 2, 96)]  # of queries, of keys, head_dim


def attention(device: str, quick: bool, windows: Sequence[int | None] = (None,)) -> Iterator[Check]:
    """The attention function itself: closed form, gradients with grouped heads, and nothing from unseen tokens.

    bfloat16: probabilities and output are rounded, and on the CPU a reader's two parts and their sum, 4 roundings;
    back, output, probabilities, slope of the scores and result, 4 too, and a prompt's keys add up the results of their
    readers (5 here) in bfloat16, a rounding each.
    """
    heads = HEADS[:2] if quick or windows != (None,) else HEADS
    types = [(torch.float32, FP32, FP32)]
    types.append((torch.bfloat16, 4 * HALF, (4 + 5) * HALF))
    for dtype, forward, backward in types:
        for (pack, (lengths, reads)), window in itertools.product(PACKS.items(), windows):
            found = [_attention_errors(device, dtype, lengths, reads, window, *shape) for shape in heads]
            name = f"attention, {str(dtype)[6:]}, {pack}" + (f", window {window}" if window else "")
            yield Check(f"{name}: output", max(f[0] for f in found), forward, note="worst of the head shapes")
            yield Check(f"{name}: gradients of q, k and v", max(f[1] for f in found), backward)
            yield Check(f"{name}: gradients at tokens that are not seen", max(f[2] for f in found), 0.0)


def _attention_errors(
    device: str, dtype: torch.dtype, lengths: Sequence[int], reads: Sequence[int], window: int | None,
    heads: int, of_keys: int, dim: int,
) -> tuple[float, float, float]:  # fmt: skip
    generator = torch.Generator().manual_seed(len(lengths) + dim)
    total = sum(lengths)

    def drawn(count: int) -> Tensor:
        """(1, count, T, dim), laid out as a model's projections are."""
        return torch.randn(1, total, count, dim, generator=generator).to(dtype).transpose(1, 2)

    given, slope = [drawn(heads), drawn(of_keys), drawn(of_keys)], drawn(heads).transpose(1, 2)
    scale = dim**-0.5
    segments = Segments(np.array(lengths), np.array(reads), device)

    def run(of: Tensor) -> tuple[Tensor, list[Tensor]]:
        inputs = [x.to(device).detach().requires_grad_() for x in given]
        query, key, value = inputs
        out, _ = packed_attention(
            nn.Identity(), query, key, value, None, scaling=scale, sliding_window=window, rlsys_segments=segments
        )
        return out, list(torch.autograd.grad(out, inputs, of.to(device)))

    seen = visible(tuple(lengths), tuple(reads), window)
    exact = [x.double().requires_grad_() for x in given]
    q, k, v = exact[0], *(x.repeat_interleave(heads // of_keys, 1) for x in exact[1:])
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
    wanted = (scores.softmax(-1) @ v).transpose(1, 2)
    slopes = torch.autograd.grad(wanted, exact, slope.double())
    out, found = run(slope)

    last = torch.zeros_like(slope)  # what only the last segment's outputs depend on
    own = slice(total - lengths[-1], total)
    last[:, own] = slope[:, own]
    unseen = ~seen[own].any(0)
    leaked = max((float(x[:, :, unseen.to(device)].abs().max()) for x in run(last)[1][1:] if unseen.any()), default=0.0)
    # A token that attends only to itself has no gradient of q and k, only rounding errors, so one norm covers both.
    return error([out], [wanted]), error(found, slopes), leaked


@cache
def visible(lengths: tuple[int, ...], reads: tuple[int, ...], window: int | None = None) -> Tensor:
    """(T, T) bool, written down token by token: `place` is a token's position in its sequence, prompt included."""
    before = [0 if read == ALONE else lengths[read] for read in reads]
    tokens = [(s, reads[s], before[s] + at) for s, length in enumerate(lengths) for at in range(length)]
    owner, reads_from, place = torch.tensor(tokens).T
    own = (owner[:, None] == owner) & (place[:, None] >= place)
    read = (reads_from[:, None] != ALONE) & (reads_from[:, None] == owner)
    near = torch.ones_like(own) if window is None else place[:, None] - place < window
    return (own | read) & near


def of_losses(bench: Bench) -> Iterator[Check]:
    """forward and forward_backward in fp32, prompts shared and packed."""
    tokens = float(bench.batch.columns["weights"].sum())
    for name in LOSSES:
        loss = losses.resolve(name)
        result, wanted = bench.wanted(loss)
        for where in ("all", "weighted"):
            ours, found = update(bench.single, bench.batch, loss, where)
            what = f"fp32, {name}, logprobs {where}"
            yield Check(f"{what}: gradient", _distance(found, wanted), FP32)
            yield Check(f"{what}: loss per token", abs(ours.loss_sum - result.loss_sum) / tokens, FP32)
        forward = bench.single.forward(RUN, bench.batch, loss)
        yield Check(f"fp32, {name}: forward's log-probabilities", _apart(forward.logprobs, result.logprobs), 1e-4)
        means = [key for key in result.metrics if key != "loss:sum"]
        worst = max(_relative(forward.metrics[key], result.metrics[key]) for key in means)
        yield Check(f"fp32, {name}: worst metric", worst, 1e-4)


def packing(bench: Bench) -> Iterator[Check]:
    """Packing with budgets from less than one sequence to more than the batch."""
    _, wanted = bench.wanted(SMOOTH)
    for budget, share in itertools.product((1, 150, 400, 100_000), (False, True)):
        _, found = update(bench.single, bench.batch, SMOOTH, token_budget=budget, share_prompts=share)
        name = f"fp32, token budget {budget}, prompts {'shared' if share else 'not shared'}: gradient"
        yield Check(name, _distance(found, wanted), FP32)


def sharing(bench: Bench) -> Iterator[Check]:
    """Shared prompts against the same learner without sharing, and a check that prompts were shared."""
    for loss in map(losses.resolve, LOSSES):
        plain, apart = update(bench.single, bench.batch, loss, share_prompts=False, token_budget=100_000)
        ours, shared = update(bench.single, bench.batch, loss, share_prompts=True, token_budget=100_000)
        yield Check(f"fp32, {loss.name}: sharing against not sharing: gradient", _distance(shared, apart), SHARED)
        yield Check(f"fp32, {loss.name}: ... : log-probabilities", _apart(ours.logprobs, plain.logprobs), 1e-4)
    costs = [sum(f.cost for f in prefix_groups(bench.batch, None, 100_000, share=share)) for share in (True, False)]
    yield Check("tokens run over with prompts shared, of those without", costs[0] / costs[1], 0.8)


def half_precision(bench: Bench) -> Iterator[Check]:
    bound = _half_bound(bench)
    cpu = bench.made("cpu", torch.bfloat16) if bench.device != "cpu" else None
    for loss in (SMOOTH, losses.resolve("cross_entropy")):
        _, wanted = bench.wanted(loss, "weighted")
        far = {}
        for share in (False, True):
            _, found = update(bench.half, bench.batch, loss, "weighted", share_prompts=share, token_budget=1000)
            far[share] = _distance(found, wanted)
            name = f"bfloat16, {loss.name}, prompts {'shared' if share else 'not shared'}: gradient"
            yield Check(name, far[share], bound, note="of the norm, against float64 of the same weights")
        yield Check(f"bfloat16, {loss.name}: sharing's error over not sharing's", far[True] / far[False], 2.0)
        if cpu is not None:
            _, found = update(cpu, bench.batch, loss, "weighted", share_prompts=False, token_budget=1000)
            name = f"bfloat16, {loss.name}: {bench.device}'s error over the CPU's"
            yield Check(name, far[False] / _distance(found, wanted), 2.0)
    result, _ = bench.wanted(SMOOTH)
    logprobs = bench.half.forward(RUN, bench.batch, SMOOTH).logprobs
    mean = float(np.abs(logprobs - result.logprobs).mean())
    spread = float(result.logprobs.std())  # of logits, of which the rounding is a part
    yield Check("bfloat16: log-probabilities, mean distance in nats", mean, bound * spread)


def chunks(bench: Bench) -> Iterator[Check]:
    """Rows of logits at once, with an adapter on the output layer (run again backward) and with a frozen one."""
    frozen = LoraValues(rank=8, alpha=16.0)
    for kind, lora in (("trained", EVERY_LINEAR), ("frozen", frozen)):
        exact = bench.made("cpu", torch.float64, lora)
        ours = bench.single if kind == "trained" else bench.made(bench.device, torch.float32, lora)
        for temperature in (1.0, 0.7):
            whole = {"token_budget": 100_000, "logprob_chunk_tokens": 1 << 20}
            _, wanted = update(exact, bench.batch, SMOOTH, "all", temperature, share_prompts=False, **whole)
            for chunk in (7, 128, 1 << 20):
                _, found = update(
                    ours, bench.batch, SMOOTH, "all", temperature, token_budget=100_000, logprob_chunk_tokens=chunk
                )
                name = f"fp32, {kind} output layer, chunks of {chunk} rows, temperature {temperature}: gradient"
                yield Check(name, _distance(found, wanted), FP32)


def chunked_alone(device: str, quick: bool) -> Iterator[Check]:
    """A frozen output layer of a real vocabulary; on CUDA the memory of it too."""
    rows, width, vocabulary = (64, 32, 5000) if quick else (4096, 512, 151_936)
    chunk = rows // 8
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, width, generator=generator) / math.sqrt(width) * 3)
    hidden = torch.randn(rows, width, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    some = slice(0, 64)  # float64 logits of all rows would be 5 GB
    exact = hidden[some].double().requires_grad_()
    wanted = torch.log_softmax(exact @ head.weight.double().T, -1).gather(1, targets[some, None])[:, 0]
    (slope,) = torch.autograd.grad(wanted.sum(), exact)

    head, inputs, targets = head.to(device), hidden.to(device).requires_grad_(), targets.to(device)
    before = _watch_memory(device)
    found = token_logprobs(head, inputs, targets, 1.0, chunk)
    (ours,) = torch.autograd.grad(found.sum(), inputs)
    peak = _peak(device)
    yield Check("log-probabilities without logits, fp32: values", error([found[some]], [wanted]), FP32)
    yield Check(
        "log-probabilities without logits, fp32: gradient of the hidden states", error([ours[some]], [slope]), FP32
    )
    if device == "cuda":
        logits = 4 * rows * vocabulary
        name = f"log-probabilities of {rows} rows in chunks of {chunk}: peak memory over one fp32 copy of all logits"
        yield Check(name, (peak - before) / logits, 0.5, note=f"{(peak - before) / 2**20:.0f} MiB")


def of_tokens(bench: Bench) -> Iterator[Check]:
    batch = bench.batch
    starts, lengths = batch.offsets[:-1], batch.lengths
    only = spans(starts + lengths // 2, lengths - lengths // 2)
    for run, temperature in ((RUN, 1.0), (None, 1.0), (RUN, 0.7)):
        wanted = bench.exact.logprobs(run, batch.tokens, batch.offsets, temperature)
        settle(bench.single, token_budget=700)
        every = bench.single.logprobs(run, batch.tokens, batch.offsets, temperature)
        some = bench.single.logprobs(run, batch.tokens, batch.offsets, temperature, only=only)
        name = f"fp32, logprobs of {'the run' if run else 'the base'}, temperature {temperature}"
        yield Check(f"{name}: all, nats", _apart(every, wanted), 1e-4)
        yield Check(f"{name}: some, nats", _apart(some[only], wanted[only]), 1e-4)
        yield Check(f"{name}: not 0 outside of only=", float(np.count_nonzero(np.delete(some, only))), 0.0)


def custom(bench: Bench) -> Iterator[Check]:
    data = datums_of(bench.batch)
    settle(bench.exact, share_prompts=False, token_budget=100_000)
    wanted, of_exact = _custom(bench.exact, bench.batch, data)
    for budget, graphs in ((100_000, None), (300, None), (300, 0.0)):
        settle(bench.single, token_budget=budget, custom_graph_gb=graphs)
        result, found = _custom(bench.single, bench.batch, data)
        passes = f"{result.metrics['custom_passes:unique']:.0f} passes"
        name = f"fp32, custom loss, token budget {budget:,}, custom_graph_gb {graphs}: {passes}"
        yield Check(f"{name}: gradient", _distance(found, of_exact), FP32)
        yield Check(f"{name}: loss", _relative(result.loss_sum, wanted.loss_sum), FP32)


def _custom(learner: Learner, batch: DatumBatch, data: Sequence[Datum]) -> tuple[Any, dict[str, Tensor]]:
    from benchmarks.gpu_parts import gradient

    result = learner.forward_backward_custom(RUN, batch, data, _sums_of_squares)
    return result, gradient(learner)


def _sums_of_squares(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """A loss that is not linear in the log-probabilities, and couples datums."""
    sums = torch.stack([logp.mean() for logp in logprobs])
    return (sums - sums.mean()).square().sum() + sum(logp.square().mean() for logp in logprobs), {}


def steps(bench: Bench) -> Iterator[Check]:
    """Three steps with clipping and weight decay from the same weights, each check in its own runs."""
    adam = AdamParams(1e-3, weight_decay=0.01, grad_clip_norm=0.5)
    ends, norms = [], []
    for learner in (bench.exact, bench.single):
        settle(learner, token_budget=1000, share_prompts=True)
        learner.runs.copy(RUN, "stepping")
        begun = {name: weight.cpu().double().clone() for name, weight in learner.runs.state("stepping").weights.items()}
        for _ in range(3):
            learner.forward_backward("stepping", bench.batch, SMOOTH, where="weighted")
            norms.append(learner.optim_step("stepping", adam)["grad_norm"])
        ended = learner.runs.state("stepping").weights
        ends.append({name: weight.cpu().double() - begun[name] for name, weight in ended.items()})
        if learner is bench.single:
            state = learner.runs.state("stepping")
            kept = RunState(state.version, _copies(state.weights), _copies(state.optimizer or {}))
            again = [_stepped(learner, kept, bench.batch, adam) for _ in range(2)]
        learner.runs.drop("stepping")
    yield Check("fp32, optim_step: the step after a restored state", _distance(again[1], again[0]), FP32)
    worst = max(_relative(ours, exact) for exact, ours in zip(norms[:3], norms[3:], strict=True))
    yield Check("fp32, optim_step: gradient norms of three steps", worst, 1e-4)
    # AdamW divides by the gradient's size, so values that are 0 but for rounding step by the full rate either way.
    yield Check("fp32, optim_step: what three steps changed", _distance(ends[1], ends[0]), 1e-2)


def _stepped(learner: Learner, state: RunState, batch: DatumBatch, adam: AdamParams) -> dict[str, Tensor]:
    """The weights on the CPU after one step from this state."""
    learner.runs.restore("stepping", state)
    learner.forward_backward("stepping", batch, SMOOTH, where="weighted")
    learner.optim_step("stepping", adam)
    return _copies(learner.runs.state("stepping").weights)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def snapshot(bench: Bench) -> Iterator[Check]:
    """The snapshot for samplers (alpha / r folded into B) is bit-identical to that of a CPU learner."""
    ours, cpu = (learner.runs._adapters.scaled("a0") for learner in (bench.single, bench.made("cpu", torch.float32)))
    same = all(torch.equal(ours[name].cpu().bfloat16(), tensor.bfloat16()) for name, tensor in cpu.items())
    yield Check("adapter as samplers get it, in bfloat16: the same bits as on the CPU", float(same), 1.0, ">=")


def greedy(bench: Bench) -> Iterator[Check]:
    prompts = [bench.batch.tokens[:20], bench.batch.tokens[5:18]]
    wanted = bench.exact.greedy(prompts, 8, [0], RUN)
    found = bench.single.greedy(prompts, 8, [0], RUN)
    same = all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    yield Check("fp32, greedy decoding: the same tokens", float(same), 1.0, ">=")


def checkpointing(bench: Bench) -> Iterator[Check]:
    _, wanted = bench.wanted(SMOOTH)
    section = LearnerValues(device=bench.device, gradient_checkpointing=True)
    learner = learner_of(bench.base, section, "bfloat16", MAX_LENGTH, torch.float32, EVERY_LINEAR)
    for share in (False, True):
        _, found = update(learner, bench.batch, SMOOTH, share_prompts=share)
        name = f"fp32, gradient checkpointing, prompts {'shared' if share else 'not shared'}: gradient"
        yield Check(name, _distance(found, wanted), FP32)


def out_of_memory(bench: Bench) -> Iterator[Check]:
    """Limit the process to the memory of a fourth of the batch; the update must still succeed."""
    random = np.random.default_rng(1)
    drawn = groups(np.full(8, 60), [random.integers(60, 200, 4) for _ in range(8)], bench.shape["vocab_size"], seed=1)
    tokens = len(drawn.tokens)
    kept = {"share_prompts": False, "logprob_chunk_tokens": 256}
    peaks = []
    for budget in (tokens // 4, tokens):
        _watch_memory("cuda")
        _, wanted = update(bench.half, drawn, SMOOTH, "weighted", token_budget=budget, **kept)
        peaks.append(torch.cuda.max_memory_reserved())
        torch.cuda.empty_cache()
    yield Check("peak memory of a fourth of the budget over that of the whole", peaks[0] / peaks[1], 0.9)
    allowed = (peaks[0] + peaks[1]) / 2
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        _, found = update(bench.half, drawn, SMOOTH, "weighted", token_budget=tokens, **kept)
        left = bench.half.token_budget.tokens
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    yield Check("token budget after running out of memory, of what it was", left / tokens, 0.5)
    bound = _half_bound(bench)  # other packs round otherwise
    yield Check("bfloat16, gradient after running out of memory", _distance(found, wanted), bound)
    _, again = update(bench.half, drawn, SMOOTH, "weighted", token_budget=tokens, **kept)
    yield Check("bfloat16, gradient of the next update", _distance(again, wanted), bound)


def _threads() -> int:
    return max(1, (os.cpu_count() or 1) // 2)


def _half_bound(bench: Bench) -> float:
    return float(2 * math.sqrt(80 * bench.shape["num_hidden_layers"]) * HALF)


def _watch_memory(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """||g - g'|| / ||g'|| over all tensors together."""
    assert found.keys() == wanted.keys()
    return error([found[name] for name in wanted], wanted.values())


def _apart(found: Array, wanted: Array) -> float:
    return float(np.abs(found.astype(np.float64) - wanted).max())


def _relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(abs(wanted), 1.0)
