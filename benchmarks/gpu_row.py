"""The H200 row: the LoRA learner on Qwen3 shapes against transformers + PEFT with SDPA, completion tokens per second.

Both sides make the same update of the same sequences on the same base, one after the other: bfloat16 base with random
weights, fp32 adapter of rank 16 on the seven linear modules, importance sampling on completions, AdamW (fused) with
learning rate 0, prompts of about 100 tokens, completions of 20 to 400, groups of 8. Micro-batches have the same maximum
number of tokens (with padding on the other side), and neither side uses activation checkpointing. If one side runs out
of memory, the maximum is halved for both. The other side is the usual loop: prompts padded on the left, completions on
the right, output layer only at completions (``logits_to_keep``), log-probabilities in fp32; once in the given order,
and once sorted by length, which needs the least padding. Each timed step follows an untimed step of the same side, so
that memory cached by torch for the other side has no effect.

Model FLOPs of an update, N of the body's linear weights, A of the adapter, V x H of the output layer, t tokens, c of
completions, sequences of L tokens, n layers of h heads of size d:

    4 N t + 6 A t + 4 V H c + 6 n h d sum(L^2)

2 N per token forward and 2 N backward, because a frozen weight has no gradient; 2 A and 4 A for the adapter; the output
layer as the body; the causal half of attention's two products, 2 n h d L^2 forward, and twice that backward.
Recomputation and padding do not count, so utilization refers to useful work. The peak is from NVIDIA's data sheet,
"H200 Tensor Core GPU", SXM, dense bfloat16: 989 TFLOP/s. No matrix product reaches it; utilization is also given
relative to 790 TFLOP/s, the reference of the target, and to one large matrix product on the same device.
"""

from __future__ import annotations

import gc
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_parts import (
    QUICK,
    QWEN3_1_7B,
    QWEN3_8B,
    RUN,
    UNTIED,
    LearnerValues,
    groups,
    learner_of,
    settle,
    write_base,
)
from benchmarks.rows import Row, Target, finish, spread
from rlsys import losses
from rlsys.datums import DatumBatch
from rlsys.learner.learner import Learner
from rlsys.types import AdamParams

PEAK, YARDSTICK = 989e12, 790e12  # FLOP/s, see above
SHAPES = {"1.7b": QWEN3_1_7B, "8b": QWEN3_8B}
TINY = {"1.7b": QUICK, "8b": UNTIED}  # in their place with --quick
OURS, SHARED = "rlsys", "rlsys, prompts shared"
THEIRS, SORTED = "transformers + PEFT", "transformers + PEFT, sorted by length"
LOSS = losses.resolve("importance_sampling")
STILL = AdamParams(0.0, eps=1e-8)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Note(Protocol):
    """Writes a fact of the current part."""

    def __call__(self, name: str, value: Any, unit: str = "", /, **more: Any) -> None: ...


def batch_of(tokens: int, vocabulary: int) -> DatumBatch:
    """A batch of about so many tokens: groups of 8, the last one truncated."""
    random = np.random.default_rng(0)
    prompts: list[int] = []
    completions: list[list[int]] = []
    total = 0
    while total < tokens:
        prompts.append(int(random.integers(80, 121)))
        completions.append([])
        while len(completions[-1]) < 8 and total < tokens:
            completions[-1].append(int(random.integers(20, 401)))
            total += prompts[-1] + completions[-1][-1]
    return groups(np.array(prompts), [np.array(c) for c in completions], vocabulary)


@dataclass
class PeftLoop:
    """transformers + PEFT: the padded loop described above."""

    model: Any
    optimizer: torch.optim.Optimizer

    @classmethod
    def load(cls, base: Path, device: str) -> PeftLoop:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
        model.config.use_cache = False
        config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)  # its adapters are fp32 on a bfloat16 base
        model.train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        assert all(weight.dtype == torch.float32 for weight in trained)
        return cls(model, torch.optim.AdamW(trained, lr=0.0, fused=True))

    def step(self, batch: DatumBatch, budget: int, by_length: bool) -> float:
        """The summed loss of one update."""
        total = torch.zeros((), device=self.model.device)
        for rows in padded_batches(batch, budget, by_length):
            loss = self._loss(batch, rows)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    def _loss(self, batch: DatumBatch, rows: list[int]) -> Tensor:
        device = self.model.device
        ids, mask, width, columns = padded(batch, rows)
        ids, mask = ids.to(device), mask.to(device)
        columns = {name: column.to(device) for name, column in columns.items()}
        logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=width + 1).logits[:, :-1]
        targets = ids[:, -width:, None]
        by_row = [row.float().log_softmax(-1).gather(1, of) for row, of in zip(logits, targets, strict=True)]
        logp = torch.stack(by_row)[..., 0]
        ratio = torch.where(columns["weights"] != 0, logp - columns["logprobs"], 0.0).exp()
        return -(ratio * columns["advantages"] * columns["weights"]).sum()


def padded_batches(batch: DatumBatch, budget: int, by_length: bool) -> Iterator[list[int]]:
    """Rows whose padded rectangle has at most `budget` tokens."""
    prompts, completions = parts(batch)
    order = np.argsort(-(prompts + completions), kind="stable") if by_length else np.arange(batch.num_datums)
    rows: list[int] = []
    for row in map(int, order):
        more = [*rows, row]
        if rows and len(more) * (prompts[more].max() + completions[more].max()) > budget:
            yield rows
            more = [row]
        rows = more
    yield rows


def parts(batch: DatumBatch) -> tuple[np.ndarray, np.ndarray]:
    """(D,) tokens of each prompt and of each completion."""
    cuts = itertools.pairwise(batch.offsets)
    completions = np.array([np.count_nonzero(batch.columns["weights"][a:b]) for a, b in cuts])
    return batch.lengths + 1 - completions, completions


def padded(batch: DatumBatch, rows: list[int]) -> tuple[Tensor, Tensor, int, dict[str, Tensor]]:
    """ids and mask (n, P + C), C, and the columns at completions, (n, C)."""
    prompts, completions = parts(batch)
    left, width = int(prompts[rows].max()), int(completions[rows].max())
    ids = np.zeros((len(rows), left + width), np.int64)
    mask = np.zeros_like(ids)
    columns = {name: np.zeros((len(rows), width), np.float32) for name in batch.columns}
    for n, row in enumerate(rows):
        cut = slice(batch.offsets[row], batch.offsets[row + 1])
        tokens = np.append(batch.tokens[cut], batch.targets[cut][-1])
        place = slice(left - prompts[row], left + completions[row])
        ids[n, place], mask[n, place] = tokens, 1
        for name, column in batch.columns.items():
            columns[name][n, : completions[row]] = column[cut][-completions[row] :]
    return torch.from_numpy(ids), torch.from_numpy(mask), width, {k: torch.from_numpy(v) for k, v in columns.items()}


def flops(model: nn.Module, shape: dict[str, Any], batch: DatumBatch, rank: int = 16) -> float:
    """Model FLOPs of one update, by the formula in the module's docstring."""
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    assert linears
    body = sum(m.weight.numel() for m in linears if m.weight.shape[0] != rank and m.weight.shape[1] != rank)
    adapter = sum(m.weight.numel() for m in linears if rank in m.weight.shape)
    _, completions = parts(batch)
    tokens, lengths = float(batch.lengths.sum()), batch.lengths.astype(np.float64)
    head = shape["vocab_size"] * shape["hidden_size"]
    squares = 6 * shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"] * (lengths**2).sum()
    return float(4 * body * tokens + 6 * adapter * tokens + 4 * head * completions.sum() + squares)


@contextmanager
def room(gigabytes: float) -> Iterator[Path]:
    """Folder for a base, in /dev/shm if it has room for the base twice."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > 2e9 * gigabytes
    with tempfile.TemporaryDirectory(dir=shm if roomy else None) as folder:
        yield Path(folder)


@dataclass
class Loaded:
    """Both sides on one base in the device's memory. `close` frees it and the base's folder."""

    kind: str
    shape: dict[str, Any]
    ours: Learner
    theirs: PeftLoop
    folder: ExitStack

    @classmethod
    def load(cls, kind: str, quick: bool, device: str, note: Note) -> Loaded:
        shape = (TINY if quick else SHAPES)[kind]
        with ExitStack() as stack:
            folder = stack.enter_context(room(2e-9 * (3 if quick else 1) * _parameters(shape)))
            began = time.perf_counter()
            count = write_base(folder / "base", shape, "bfloat16", device, 4096, spread=0.02)
            _free(device)
            note("base made and written", time.perf_counter() - began, "s", parameters=count)
            began = time.perf_counter()
            ours = learner_of(folder / "base", LearnerValues(device=device), "bfloat16", 4096, bold=False)
            note("base loaded by rlsys", time.perf_counter() - began, "s")
            began = time.perf_counter()
            theirs = PeftLoop.load(folder / "base", device)
            note("base loaded by transformers + PEFT", time.perf_counter() - began, "s")
            return cls(kind, shape, ours, theirs, stack.pop_all())

    def close(self, device: str) -> None:
        self.folder.close()
        del self.ours, self.theirs
        _free(device)


def row(
    loaded: Loaded, quick: bool, device: str, size: int, repeats: int, ceiling: float, out: Path, note: Note
) -> bool:
    """Measure one size of a step; whether its target was met. Every figure is noted when it is known, and the ratio
    after each repetition, so that a row that is cut off still says something."""
    shape, ours, theirs = loaded.shape, loaded.ours, loaded.theirs
    batch = batch_of(size, shape["vocab_size"])
    completions = float(batch.columns["weights"].sum())
    work = flops(ours._model, shape, batch)
    budget, losses_of = _common_budget(batch, size, ours, theirs, device)
    note("micro-batch of both sides", budget, "tokens")

    def of_rlsys(share: bool) -> None:
        settle(ours, share_prompts=share, token_budget=budget)
        ours.forward_backward(RUN, batch, LOSS, where="weighted")
        ours.optim_step(RUN, STILL)
        assert ours.token_budget.tokens == budget, "ran out of memory with a budget that had sufficed"

    steps: dict[str, Callable[[], object]] = {
        OURS: lambda: of_rlsys(False),
        THEIRS: lambda: theirs.step(batch, budget, by_length=False),
        SORTED: lambda: theirs.step(batch, budget, by_length=True),
        SHARED: lambda: of_rlsys(True),
    }
    peaks: dict[str, float] = {}
    sides: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):  # alternate, so that other load affects all sides
        for name, step in steps.items():
            rate, peak = _timed(step, completions, device)
            peaks[name] = max(peaks.get(name, 0.0), peak)
            sides[name].append(rate)
            achieved = work * rate / completions
            shares = {"of 790 TFLOP/s": achieved / YARDSTICK, "of 989 TFLOP/s": achieved / PEAK}
            note(name, rate, "tokens of completions/s", **{k: round(v, 4) for k, v in shares.items()})
        ratio = float(np.median([a / b for a, b in zip(sides[OURS], sides[THEIRS], strict=True)]))
        note(f"{OURS} over {THEIRS}, median so far", ratio, "", repetitions=len(sides[OURS]))
    target = Target(OURS, THEIRS, 2.0, ">=")
    shape_name = "tiny" if quick else f"Qwen3-{loaded.kind}"
    where = _name(device).replace(" ", "-").lower()
    shares_of = {
        f"share of {peak / 1e12:.0f} TFLOP/s": {
            name: spread([work * value / completions / peak for value in values]) for name, values in sides.items()
        }
        for peak in (YARDSTICK, PEAK, ceiling)
    }
    found = Row(
        f"{where}_{'tiny-' if quick else ''}{loaded.kind}_{size}",
        f"LoRA learner, {shape_name} shape, about {size} tokens per step, {_name(device)}",
        f"make gpu-check (python -m benchmarks.gpu_check --row {loaded.kind})",
        "tokens of completions/s",
        sides,
        [target],
        {
            "base": "bfloat16, random weights", "adapter": "fp32, rank 16, seven linears",
            "sequences": batch.num_datums, "tokens": int(batch.lengths.sum()),
            "tokens of completions": int(completions),
            "tokens of a micro-batch": budget, "gradient checkpointing": "neither side",
            "optimizer": "AdamW, fused",
        },
        {
            **shares_of,
            "model TFLOP of a step": work / 1e12,
            "a large product in bfloat16, TFLOP/s": ceiling / 1e12,
            "peak memory of a step over what is resident, GiB": peaks,
            "padded micro-batches": {
                name: len(list(padded_batches(batch, budget, name == SORTED))) for name in (THEIRS, SORTED)
            },
            "loss of one step": losses_of,
            "device": _name(device),
        },
    )  # fmt: skip
    finish(found, out / f"{found.name}.json")
    for name, peak in peaks.items():
        note(f"{name}: peak memory of a step over what is resident", peak, "GiB")
    return bool(target.met(ratio))


def _timed(step: Callable[[], object], completions: float, device: str) -> tuple[float, float]:
    """(tokens of completions per second, GiB at the peak over what is resident) of the second of two steps."""
    _free(device)
    resident = _reset(device)
    step()
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return completions / (time.perf_counter() - began), (_peak(device) - resident) / 2**30


def _common_budget(
    batch: DatumBatch, size: int, ours: Learner, theirs: PeftLoop, device: str
) -> tuple[int, dict[str, float]]:
    """The largest micro-batch, in tokens, for which both sides have enough memory, and both sides' loss: they must
    agree, or they do not compute the same."""
    budget = size
    while True:
        settle(ours, share_prompts=False, token_budget=budget)
        found = ours.forward_backward(RUN, batch, LOSS, where="weighted").loss_sum
        ours.optim_step(RUN, STILL)
        budget = ours.token_budget.tokens
        _free(device)
        try:
            wanted = [theirs.step(batch, budget, by_length) for by_length in (False, True)]
        except torch.OutOfMemoryError:
            theirs.optimizer.zero_grad(set_to_none=True)
            _free(device)
            budget //= 2
            continue
        scale = float(np.abs(batch.columns["advantages"]).sum())
        # A log-probability of random weights differs by some hundredths of a nat in bfloat16, with either sign.
        for value in wanted:
            assert math.isclose(found, value, abs_tol=0.02 * scale), f"losses differ: {found} and {value} of {scale}"
        return budget, {OURS: found, THEIRS: wanted[0], SORTED: wanted[1]}


def _parameters(shape: dict[str, Any]) -> int:
    ends = shape["vocab_size"] * shape["hidden_size"] * (1 if shape["tie_word_embeddings"] else 2)
    of_heads = (shape["num_attention_heads"] * 2 + shape["num_key_value_heads"] * 2) * shape["head_dim"]
    layer = shape["hidden_size"] * (of_heads + 3 * shape["intermediate_size"])
    return int(ends + shape["num_hidden_layers"] * layer)


def ceiling_of(device: str) -> float:
    """FLOP/s of a large matrix product of random numbers on this device."""
    width = 8192 if device == "cuda" else 256
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = []
    for _ in range(8):
        _wait(device)
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        _wait(device)
        found.append(5 * 2 * width**3 / (time.perf_counter() - began))
    return float(np.median(found[3:]))


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _reset(device: str) -> int:
    """Reset the peak statistics; returns the bytes allocated now."""
    _wait(device)
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
