"""Tokens per second of ``rlsys.learner.learner.Learner`` against transformers + PEFT with padded batches.

    python -m benchmarks.learner [--dtype bfloat16 float32] [--threads 2] [--repeats 5] [--profile]
    python -m benchmarks.learner --model smollm2 --dtype bfloat16 --gsm8k ../gsm8k

One update of a 54M Qwen3 shape with LoRA r16 on its seven linear layers: forward and backward over DATUMS sequences
(groups of 8, prompts of 90 to 110 tokens, completion lengths uniform in 20 to 400, seed 0), then AdamW. The rate is
completion tokens per second. Held equal: token budget, dtype (base in bfloat16 with fp32 adapters, or all fp32),
threads, sequences and loss (PPO's clipped ratio). Neither side uses activation checkpointing or shared prompts.

The other side pads on the right: rows x longest <= budget, attention mask, transformers' SDPA attention, logits of all
positions, their log-softmax in fp32, gather, loss, backward, and AdamW after the last batch. It is measured twice: with
sequences in random order, which is the usual loop and the reference of the target, and sorted by length.

smollm2 is the same with the real model and sequences as in a GRPO step: 8 groups of 8 completions of 200 tokens of
text, on prompts of 100 to 150 tokens. Here rlsys is measured with shared prompts, as in a job, and without; sorting
changes nothing, because the lengths are similar.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real import described, prompts_of, real_model
from benchmarks.rows import Row, Target, by_turns, finish
from benchmarks.shapes import DTYPES, S54, write_model
from rlsys import losses
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.data.problems import ProblemSet
from rlsys.datums import DatumBatch
from rlsys.learner.learner import Learner
from rlsys.rollouts import offsets_of
from rlsys.types import AdamParams, Array

BUDGET, GROUP = 4096, 8
DATUMS = {"54m": 32, "smollm2": 64}
ADAM = AdamParams(learning_rate=1e-4)
LORA = LoraSection(rank=16, alpha=32.0)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOW, HIGH = 0.8, 1.2
NOISE = 0.1  # nats between the log-probabilities of sampler and learner
ALL, SORTED, OURS, APART = "padded, as drawn", "padded, sorted by length", "rlsys", "rlsys, prompts not shared"
SIDES = {"54m": [OURS, ALL, SORTED], "smollm2": [OURS, APART, ALL]}
TARGETS = {
    "54m": [Target(OURS, ALL, 2.0, ">="), Target(OURS, SORTED, 1.0, ">=")],
    "smollm2": [Target(OURS, ALL, 3.0, ">="), Target(APART, ALL, 2.0, ">=")],
}


def drawn(datums: int, vocab_size: int, seed: int = 0) -> DatumBatch:
    """Random sequences with weight only on completions."""
    random = np.random.default_rng(seed)
    prompts = np.repeat(random.integers(90, 111, datums // GROUP), GROUP)
    completions = random.integers(20, 401, datums)
    # of a random model every token has about the same probability, so the ratio is near 1, as on policy
    lengths = prompts + completions - 1
    logprobs = -np.log(vocab_size) + random.normal(0, NOISE, lengths.sum())
    by_datum = random.normal(size=datums)
    ids = [random.integers(1, vocab_size, int(length) + 1) for length in lengths]
    for group in range(0, datums, GROUP):
        for member in range(group, group + GROUP):
            ids[member][: prompts[group]] = ids[group][: prompts[group]]
    return aligned(ids, prompts, logprobs, by_datum)


def aligned(ids: Sequence[Array], prompts: Array, logprobs_T: Array, by_datum: Array) -> DatumBatch:
    """Datums of complete sequences with weight 0 on the first `prompts` tokens."""
    lengths = np.array([len(sequence) - 1 for sequence in ids])  # predictions
    offsets = offsets_of(lengths)
    first = np.repeat(offsets[:-1] + prompts - 1, lengths)
    weights = (np.arange(offsets[-1]) >= first).astype(np.float32)
    return DatumBatch(
        np.concatenate([sequence[:-1] for sequence in ids]).astype(np.int32),
        np.concatenate([sequence[1:] for sequence in ids]).astype(np.int32),
        offsets,
        {
            "weights": weights,
            "logprobs": (logprobs_T * weights).astype(np.float32),
            "advantages": (np.repeat(by_datum, lengths) * weights).astype(np.float32),
        },
    )


def as_grpo_has_them(learner: Learner, problems: ProblemSet, groups: int, completion: int) -> DatumBatch:
    """Groups on the first problems, in order; completions are text of the others, and their log-probabilities are the
    base's with some noise, so that the ratio is near 1, as on policy."""
    random = np.random.default_rng(0)
    heads, offsets = problems.select(range(groups))
    text = np.resize(problems.prompt_tokens[problems.prompt_offsets[groups] :], groups * GROUP * completion)
    tails = text.reshape(groups, GROUP, completion)
    ids = [
        np.concatenate([head, tail])
        for head, members in zip(np.split(heads, offsets[1:-1]), tails, strict=True)
        for tail in members
    ]
    whole = offsets_of([len(sequence) for sequence in ids])
    base = np.delete(learner.logprobs(None, np.concatenate(ids), whole), whole[:-1])  # of each but the first
    prompts = np.repeat(np.diff(offsets), GROUP)
    return aligned(ids, prompts, base + random.normal(0, NOISE, len(base)), random.normal(size=len(ids)))


class Padded:
    """transformers and PEFT, used as in their documentation."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        config = LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=LINEARS, lora_dropout=0.0)
        self.model: Any = get_peft_model(base, config)  # which makes adapters fp32 on a bfloat16 base
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        assert all(weight.dtype == torch.float32 for weight in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=ADAM.learning_rate, weight_decay=ADAM.weight_decay)

    def forward_backward(self, batch: DatumBatch, by_length: bool) -> float:
        order = np.argsort(batch.lengths, kind="stable") if by_length else np.arange(batch.num_datums)
        total = 0.0
        for rows in padded_batches(batch.lengths, order, BUDGET):
            total += self._micro_batch(batch, rows)
        return total

    def _micro_batch(self, batch: DatumBatch, rows: np.ndarray[Any, Any]) -> float:
        longest = int(batch.lengths[rows].max())

        def padded(column: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
            out = torch.zeros(len(rows), longest, dtype=dtype)
            for at, row in enumerate(rows):
                part = column[batch.offsets[row] : batch.offsets[row + 1]]
                out[at, : len(part)] = torch.from_numpy(part.copy())
            return out

        ids, targets = padded(batch.tokens, torch.int64), padded(batch.targets, torch.int64)
        mask = padded(np.ones_like(batch.tokens), torch.int64)
        columns = {key: padded(column, torch.float32) for key, column in batch.columns.items()}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logp = torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]
        ratio = (logp - columns["logprobs"]).exp()
        gain = torch.minimum(ratio * columns["advantages"], ratio.clamp(LOW, HIGH) * columns["advantages"])
        loss = -(gain * columns["weights"]).sum()
        loss.backward()
        return float(loss.detach())

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def padded_batches(lengths: Any, order: Any, budget: int) -> list[Any]:
    """Neighbours in `order` while rows x longest fits."""
    batches: list[list[int]] = [[]]
    longest = 0
    for row in order:
        longest = max(longest, int(lengths[row]))
        if batches[-1] and (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = int(lengths[row])
        batches[-1].append(int(row))
    return [np.asarray(batch) for batch in batches]


def ours(folder: Path, dtype: str, threads: int, share: bool = False) -> Learner:
    section = LearnerSection(threads=threads, token_budget=BUDGET, share_prompts=share)
    learner = Learner(folder, ModelSection(path=str(folder), dtype=dtype, max_length=1024), section)
    learner.runs.create("run", LORA, seed=0)
    return learner


@dataclass(frozen=True, slots=True)
class Work:
    """The model of each side, and the batch."""

    learners: Mapping[str, Learner]  # side -> learner
    padded: Padded
    batch: DatumBatch
    about: Mapping[str, Any]


def prepare(model: str, dtype: str, threads: int, datums: int, tokens: int, gsm8k: Path | None) -> Work:
    if model == "54m":
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parameters = write_model(folder, S54, dtype)
            base = f"{parameters / 1e6:.1f}M parameters in {dtype}, adapters in float32"
            learners = {OURS: ours(folder, dtype, threads)}
            batch = drawn(datums, S54["vocab_size"])
            return Work(learners, Padded(folder, dtype), batch, {"base": base, "prompts shared": False})
    folder = real_model()
    prompts = prompts_of(folder, gsm8k)
    learners = {OURS: ours(folder, dtype, threads, share=True), APART: ours(folder, dtype, threads)}
    batch = as_grpo_has_them(learners[OURS], prompts.problems, datums // GROUP, tokens)
    about = {
        "base": {**described(folder), "dtype": dtype, "adapters": "float32"},
        "prompts": prompts.about,
        "completions": f"{GROUP} of each prompt, {tokens} tokens",
        "prompts shared": {OURS: True, APART: False, ALL: False},
    }
    return Work(learners, Padded(folder, dtype), batch, about)


def measure(model: str, dtype: str, threads: int, options: argparse.Namespace) -> Row:
    datums = options.datums or DATUMS[model]
    work = prepare(model, dtype, threads, datums, options.tokens, options.gsm8k)
    padded, batch, learner = work.padded, work.batch, work.learners[OURS]
    torch.set_num_threads(threads)
    loss = losses.resolve("ppo", {"clip_low_threshold": LOW, "clip_high_threshold": HIGH})
    tokens = float(batch.columns["weights"].sum())

    def update_ours(learner: Learner = learner) -> float:
        found = learner.forward_backward("run", batch, loss, where="weighted")
        learner.optim_step("run", ADAM)
        return found.loss_sum

    def update_padded(by_length: bool) -> float:
        found = padded.forward_backward(batch, by_length)
        padded.step()
        return found

    def rate(update: Callable[[], float]) -> Callable[[], float]:
        def side() -> float:
            began = time.perf_counter()
            update()
            return tokens / (time.perf_counter() - began)

        return side

    every = {
        **{side: rate(partial(update_ours, made)) for side, made in work.learners.items()},
        ALL: rate(lambda: update_padded(False)),
        SORTED: rate(lambda: update_padded(True)),
    }
    # Before any step both sides compute the base, so the losses must be equal.
    first = learner.forward_backward("run", batch, loss).loss_sum, padded.forward_backward(batch, True)
    learner.runs.forget_gradient("run")
    padded.optimizer.zero_grad(set_to_none=True)
    bound = 1e-3 if dtype == "float32" else 3e-2
    assert abs(first[0] - first[1]) <= bound * float(np.abs(batch.columns["advantages"]).sum()), first
    found = by_turns({side: every[side] for side in options.sides or SIDES[model]}, options.repeats)
    cells = {
        name: int(sum(len(rows) * batch.lengths[rows].max() for rows in padded_batches(batch.lengths, order, BUDGET)))
        for name, order in ((ALL, np.arange(datums)), (SORTED, np.argsort(batch.lengths, kind="stable")))
    }
    more: dict[str, Any] = {"loss of the first update": first, "cells of padded batches": cells}
    if options.profile:
        more["profile"] = profiled(update_ours)
    one = "1_thread" if threads == 1 else f"{threads}_threads"
    of_model = "" if model == "54m" else f"{model}_"
    what = "" if model == "54m" else ", SmolLM2-135M-Instruct"
    return Row(
        f"learner_{of_model}{dtype}_{one}",
        f"learner tokens/s{what}, {dtype}, {one.replace('_', ' ')}",
        "python -m benchmarks.learner" + ("" if model == "54m" else f" --model {model}"),
        "completion tokens/s",
        found,
        [target for target in TARGETS[model] if target.of in found and target.to in found],
        {
            **work.about,
            "threads": threads,
            "sequences": datums,
            "tokens read": len(batch.tokens),
            "completion tokens": int(tokens),
            "token budget": BUDGET,
            "gradient checkpointing": False,
            "loss": "ppo",
            "optimizer": "AdamW, one step per update",
        },
        more,
    )


def profiled(work: Callable[[], object], most: int = 12) -> dict[str, str]:
    """Time share of each torch operation, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: f"{event.self_cpu_time_total / total:.1%}" for event in events[:most]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--model", choices=SIDES, default="54m")
    parser.add_argument("--datums", type=int, help=f"sequences; by default {DATUMS}")
    parser.add_argument("--tokens", type=int, default=200, help="of a completion, for smollm2")
    parser.add_argument("--gsm8k", type=Path, help="folder with its train.jsonl and test.jsonl, for smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=(OURS, APART, ALL, SORTED), help="by default the model's own")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    for dtype in arguments.dtype:
        for threads in arguments.threads:
            finish(measure(arguments.model, dtype, threads, arguments))


if __name__ == "__main__":
    main()
