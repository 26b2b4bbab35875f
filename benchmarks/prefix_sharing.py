"""Completion tokens per second of the learner with and without prompts shared within groups.

    python -m benchmarks.prefix_sharing [--prompt 512] [--completion 64] [--group 16] [--groups 1]

One learner, one batch, one budget; only `learner.share_prompts` differs. S54 (benchmarks/shapes.py), bfloat16 base with
an fp32 adapter, and once float32; LoRA of rank 16 on the seven linear modules; importance sampling; forward_backward
and optim_step with learning rate 0; log-probabilities only at completions on both sides. The gradients are compared
before timing. Another row has prompts of 100 tokens and completions of 20 to 400 in groups of 8.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.rows import Row, Target, by_turns, finish, seconds
from benchmarks.shapes import DTYPE, DTYPES, S54, write_model
from rlsys import losses
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.datums import DatumBatch
from rlsys.learner.learner import Learner
from rlsys.rollouts import offsets_of, spans
from rlsys.types import AdamParams, Array

RUN = "run"
LOSS = losses.resolve("importance_sampling")


def batch_of(prompt: int, completion_lengths: Array, group: int) -> DatumBatch:
    """Completions of those lengths, `group` of them on each prompt."""
    random = np.random.default_rng(0)
    prompts = random.integers(1, S54["vocab_size"], (-(-len(completion_lengths) // group), prompt))
    rows = [
        np.concatenate([prompts[i // group], random.integers(1, S54["vocab_size"], length)])
        for i, length in enumerate(completion_lengths)
    ]
    offsets = offsets_of([len(row) - 1 for row in rows])
    weights = np.zeros(offsets[-1], np.float32)
    weights[spans(offsets[:-1] + prompt - 1, completion_lengths)] = 1.0
    return DatumBatch(
        np.concatenate([row[:-1] for row in rows]).astype(np.int32),
        np.concatenate([row[1:] for row in rows]).astype(np.int32),
        offsets,
        {
            "weights": weights,
            "logprobs": np.full(offsets[-1], -10.0, np.float32) * weights,
            "advantages": random.normal(size=offsets[-1]).astype(np.float32) * weights,
        },
    )


def measure(name: str, dtype: str, batch: DatumBatch, about: str, options: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        write_model(base, S54, dtype)
        model = ModelSection(path=str(base), dtype=dtype, max_length=1024)

        def learner(share: bool) -> Learner:
            section = LearnerSection(threads=options.threads, token_budget=options.budget, share_prompts=share)
            made = Learner(base, model, section)
            made.runs.create(RUN, LoraSection(rank=16), 0)
            return made

        shared, apart = learner(True), learner(False)
        error = difference(shared, apart, batch)
        completion = float(batch.columns["weights"].sum())

        def rate(made: Learner) -> Callable[[], float]:
            def step() -> None:
                made.forward_backward(RUN, batch, LOSS, where="weighted")
                made.optim_step(RUN, AdamParams(0.0))

            timed = seconds(step)
            return lambda: completion / timed()

        sides = by_turns({"shared": rate(shared), "not shared": rate(apart)}, options.repeats)
    return Row(
        name,
        f"prompts shared in the learner, {dtype}: {about}",
        "python -m benchmarks.prefix_sharing",
        "tokens of completions/s",
        sides,
        [Target("shared", "not shared", 3.0, ">=")] if "512_64" in name else [],
        {"batch": about, "dtype": dtype, "threads": options.threads, "token budget": options.budget, "rank": 16},
        {"difference of the gradients, ||g - g'|| / ||g||": error},
    )


def difference(one: Learner, other: Learner, batch: DatumBatch) -> float:
    """Of the gradients, after a step that has moved B away from 0."""
    found = []
    for learner in (one, other):
        learner.forward_backward(RUN, batch, LOSS, where="weighted")
        learner.optim_step(RUN, AdamParams(1e-3))
        learner.runs.restore(RUN, one.runs.state(RUN))
        learner.forward_backward(RUN, batch, LOSS, where="weighted")
        found.append(gradient(learner))
    return float((found[0] - found[1]).norm() / found[1].norm())


def gradient(learner: Learner) -> torch.Tensor:
    """The accumulated gradient as one vector; cleared in the learner."""
    found = []
    for name, weight in learner.runs[RUN].parameters.items():
        assert weight.grad is not None, f"{name} has no gradient"
        found.append(weight.grad.reshape(-1))
    learner.runs.forget_gradient(RUN)
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    cases = [(dtype, options.prompt, options.group, options.groups, None) for dtype in DTYPES]
    ragged = np.random.default_rng(0).integers(20, 401, 32)
    for dtype, prompt, group, groups, lengths in [*cases, (DTYPE, 100, 8, 4, ragged)]:
        of_length = "20 to 400" if lengths is not None else str(options.completion)
        about = f"prompts of {prompt}, completions of {of_length}, G = {group}, {groups} groups"
        name = f"prefix_sharing_{dtype}_{prompt}_{'ragged' if lengths is not None else options.completion}"
        if lengths is None:
            lengths = np.full(group * groups, options.completion)
        finish(measure(name, dtype, batch_of(prompt, lengths, group), about, options))


if __name__ == "__main__":
    main()
