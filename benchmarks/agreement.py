"""Difference between learner and sampler on sampled tokens: |p - q| by position, beside two kernels of transformers.

    python -m benchmarks.agreement [--dtypes bfloat16 float32 float16] [--gsm8k ../gsm8k] [--model models/...]

The engine samples completions from a real model with version 0 of an adapter (the base), and again after a few
optimizer steps. Each token then has four log-probabilities, given the tokens before it:

    sampler   the engine's value when it sampled the token; for prompt tokens, its prompt log-probabilities
    learner   rlsys.learner.learner, packed, as in the loss
    sdpa      transformers + PEFT, one sequence at a time, torch's fused attention
    eager     the same with transformers' eager attention

Positions count from the prompt's first token. Target: learner and sampler do not differ more than sdpa and eager, two
kernels of the same library. Prints a table and writes a row for each dtype; values are means over the sampled tokens
of a completion.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.grpo_task import share_of_vowels
from benchmarks.real import Prompts, described, prompts_of
from benchmarks.rows import Row, Target, finish
from examples.real_model import FOLDER
from rlsys.advantages import to_minibatches
from rlsys.config import JobConfig, LearnerSection, ModelSection, Precision, RlSection, RunSection, SamplerSection
from rlsys.errors import ConfigError
from rlsys.learner.learner import Learner
from rlsys.learner.policy import POSITION_RANGES, UNBOUNDED, Policy, join_prompts
from rlsys.rollouts import Rollouts, spans
from rlsys.sampler.engine import Sampler
from rlsys.tokenization.stop_conditions import load_tokenizer
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.canary import canary_tokens

RUN = "agreement"
GROUP = 2  # completions per prompt: the minimum for an advantage
SAMPLER, LEARNER, SDPA, EAGER, BASE = "sampler", "learner", "sdpa", "eager", "learner, no adapter"
PAIRS = {
    "learner to sampler": (LEARNER, SAMPLER),
    "sdpa to eager": (SDPA, EAGER),
    "learner to sdpa": (LEARNER, SDPA),
    "sampler to sdpa": (SAMPLER, SDPA),
}
OURS, THEIRS = "learner to sampler", "sdpa to eager"


@dataclass(frozen=True, slots=True)
class Scored:
    """Sequences sampled with one version, and the log-probabilities of their T tokens by each implementation."""

    version: int
    tokens: Array  # (T,) int32, prompt + completion of each sequence end to end
    offsets: Array  # (R + 1,)
    sampled: Array  # (T,) bool, of a completion
    logprobs: Mapping[str, Array]  # (T,) float32 nats each; 0.0 of each first token

    @property
    def position(self) -> Array:
        """(T,) position of each token in its sequence."""
        return np.arange(len(self.tokens)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def gap(self, one: str, other: str) -> Array:
        """(T,) |p - q|."""
        found: Array = np.abs(self.logprobs[one].astype(np.float64) - self.logprobs[other])
        return found

    def by_completion(self, one: str, other: str) -> list[float]:
        """Mean over the sampled tokens of each completion."""
        gap = np.add.reduceat(np.where(self.sampled, self.gap(one, other), 0.0), self.offsets[:-1])
        return (gap / np.add.reduceat(self.sampled, self.offsets[:-1], dtype=np.int64)).tolist()

    def by_position(self) -> dict[str, dict[str, Any]]:
        """Range of positions -> tokens, and mean and max of every pair; prompt and completion apart."""
        found: dict[str, dict[str, Any]] = {}
        for kind, of_kind in (("prompt", ~self.sampled & (self.position > 0)), ("completion", self.sampled)):
            for first, end in pairwise(POSITION_RANGES):
                inside = of_kind & (self.position >= first) & (self.position < end)
                if inside.any():
                    gaps = {name: self.gap(*pair)[inside] for name, pair in PAIRS.items()}
                    about = {name: {"mean": float(gap.mean()), "max": float(gap.max())} for name, gap in gaps.items()}
                    span = f"{first}-{end}" if end < UNBOUNDED else f"{first}-"
                    found[f"{kind} {span}"] = {"tokens": int(inside.sum()), **about}
        return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER, help="a Hugging Face folder; default: `make real-model`")
    parser.add_argument("--dtypes", nargs="+", choices=get_args(Precision), default=["bfloat16", "float32", "float16"])
    parser.add_argument("--gsm8k", type=Path, help="folder with its train.jsonl and test.jsonl; default: arithmetic")
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400, help="of a completion, at most")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, all on the completions of version 0")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def job(dtype: Precision, prompts: Prompts, options: argparse.Namespace) -> JobConfig:
    rl = {
        "steps": options.steps,
        "sampling": {"max_tokens": options.tokens},
        "optim": {"learning_rate": options.learning_rate, "warmup_steps": 0},
        "advantages": {"normalise": "std", "aggregate": "length"},
    }
    return JobConfig(
        run=RunSection(name=RUN),
        model=ModelSection(path=str(options.model), dtype=dtype, max_length=max(prompts.lengths) + options.tokens),
        learner=LearnerSection(threads=options.threads),
        sampler=SamplerSection(threads=options.threads, kv_cache_gb=0.5),
        rl=RlSection.model_validate(rl),
    )


async def measure(dtype: Precision, options: argparse.Namespace) -> Row:
    prompts = prompts_of(options.model, options.gsm8k)
    config = job(dtype, prompts, options)
    policy = Policy(Learner(options.model, config.model, config.learner), config, canary_tokens(prompts.problems))
    sampler = Sampler(name="0", base=options.model, model=config.model, section=config.sampler, seed=0)
    problems = np.arange(options.completions // GROUP)
    params = SamplingParams(options.tokens, seed=1)
    found = []
    await sampler.start()
    try:
        for version in (0, options.steps):
            await sampler.load(policy.publish())
            rollouts = await sampler.sample(problems, *prompts.problems.select(problems), GROUP, params, RUN, version)
            found.append(await scored(rollouts, version, policy.learner, sampler, options.model, dtype))
            if version == 0:
                learn(policy, rollouts, options.model)
    finally:
        await sampler.stop()
    return row(found, dtype, prompts.about, policy.learner.computing_dtype, options)


def learn(policy: Policy, rollouts: Rollouts, model: Path) -> None:
    """rl.steps optimizer steps on one batch. The reward is one in which two completions differ."""
    ends = rollouts.offsets[1:-1]
    texts = load_tokenizer(model).batch_decode([part.tolist() for part in np.split(rollouts.tokens, ends)])
    rewards = np.array([share_of_vowels(text, "") for text in texts], np.float32)
    (batch,), *_ = to_minibatches(rollouts, rewards, policy.config.rl, 1)
    for step in range(1, policy.config.rl.steps + 1):
        policy.learn(batch, step, 0, first=True, last=True, on_policy=step == 1)


async def scored(
    rollouts: Rollouts, version: int, learner: Learner, sampler: Sampler, model: Path, dtype: Precision
) -> Scored:
    """By all four."""
    tokens, offsets, places = join_prompts(rollouts)
    sampled = np.zeros(len(tokens), bool)
    sampled[places] = True
    of_prompts = await sampler.logprobs(rollouts.prompt_tokens, rollouts.prompt_offsets, RUN, version)
    starts, lengths = rollouts.prompt_offsets[:-1][rollouts.group], np.diff(rollouts.prompt_offsets)[rollouts.group]
    q = np.zeros(len(tokens), np.float32)
    q[places], q[~sampled] = rollouts.logprobs, of_prompts[spans(starts, lengths)]
    logprobs = {SAMPLER: q, LEARNER: learner.logprobs(RUN, tokens, offsets)}
    logprobs[BASE] = learner.logprobs(None, tokens, offsets)
    with tempfile.TemporaryDirectory(prefix="rlsys-agreement-") as adapter:
        learner.runs.save_adapter(RUN, Path(adapter))
        for kernel in (SDPA, EAGER):
            logprobs[kernel] = by_transformers(model, Path(adapter), dtype, kernel, tokens, offsets)
    return Scored(version, tokens, offsets, sampled, logprobs)


def by_transformers(model: Path, adapter: Path, dtype: str, kernel: str, tokens: Array, offsets: Array) -> Array:
    """(T,) float32 nats, one sequence at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation=kernel)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    found = np.zeros(len(tokens), np.float32)
    with torch.no_grad():
        for start, end in pairwise(offsets.tolist()):
            ids = torch.from_numpy(tokens[start:end].astype(np.int64))
            logits = adapted(input_ids=ids[None], use_cache=False).logits[0, :-1]
            logp = torch.log_softmax(logits.float(), -1).gather(-1, ids[1:, None])[:, 0]
            found[start + 1 : end] = logp.numpy()
    return found


def row(found: list[Scored], dtype: str, about: str, computing: str, options: argparse.Namespace) -> Row:
    tables = {f"version {each.version}": each.by_position() for each in found}
    moved = {f"version {each.version}": float(each.gap(LEARNER, BASE)[each.sampled].mean()) for each in found}
    above = [
        f"{version}, {span}"
        for version, table in tables.items()
        for span, cells in table.items()
        if cells[OURS]["mean"] > cells[THEIRS]["mean"]
    ]
    name = options.model.name
    return Row(
        f"agreement_{name}_{dtype}",
        f"distance of log-probabilities, mean of a completion, {name}, {dtype}",
        "python -m benchmarks.agreement",
        "nats",
        {side: [value for each in found for value in each.by_completion(*PAIRS[side])] for side in PAIRS},
        [Target(OURS, THEIRS, 1.0, "<=")],
        {
            "model": described(options.model),
            "dtype": dtype,
            "learner computes in": computing,
            "prompts": about,
            "completions": f"{options.completions} of each version, at most {options.tokens} tokens",
            "threads": options.threads,
            "optimizer steps": options.steps,
            "learning rate": options.learning_rate,
        },
        {"by position": tables, "mean distance to the base": moved, "means above those of sdpa to eager": above},
    )


def table_of(of_row: Row) -> str:
    """Text table of mean and max by position."""
    lines = [f"{'nats: mean (max)':<34} {'tokens':>6}  " + "".join(f"{name:>24}" for name in PAIRS)]
    for version, table in of_row.more["by position"].items():
        moved = of_row.more["mean distance to the base"][version]
        lines.append(f"{version}, {moved:.3g} nats from the base")
        for span, cells in table.items():
            values = "".join(f"{cells[name]['mean']:>13.2e} ({cells[name]['max']:.2e})" for name in PAIRS)
            lines.append(f"  {span:<32} {cells['tokens']:>6}  {values}")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    options.model = options.model.resolve()
    if not options.model.is_dir():
        raise SystemExit(f"--model: {options.model} is no folder; `make real-model` brings one")
    for dtype in options.dtypes:
        try:
            measured = asyncio.run(measure(dtype, options))
        except ConfigError as error:
            print(f"agreement: {dtype} left out, it is refused here: {error}")
            continue
        print(table_of(measured))
        finish(measured)


if __name__ == "__main__":
    main()
