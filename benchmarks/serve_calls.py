"""What both sides of the benchmarks of `rlsys serve` do, written once: `types` and clients are tinker's or rlsys's.

Runs in the environment of a client too, so it imports no part of rlsys.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any  # clients and types of two packages with the same methods

import numpy as np

VOCABULARY = 2048
RANK, LEARNING_RATE = 16, 1e-4
PROMPTS, GROUP, MAX_TOKENS = 16, 8, 32
PROMPT_TOKENS = (24, 40)
DATUMS, LENGTH = 64, 512
TOKEN_REPEATS = 20
FIRST_REQUESTS = 200  # that warm up a load
LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of the parts of a GRPO step, and the sampling client of the next."""

    sample_s: float
    learn_s: float
    sync_s: float
    sampler: Any


def prompts(step: int) -> list[list[int]]:
    """The prompts of a step, the same on both sides."""
    draw = np.random.default_rng(step)
    return [draw.integers(1, VOCABULARY, draw.integers(*PROMPT_TOKENS)).tolist() for _ in range(PROMPTS)]


def grpo_step(types: Any, trainer: Any, sampler: Any, step: int) -> Step:
    """Sample, grade, one update, and a sampling client of the new weights."""
    began = time.perf_counter()
    params = types.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0)
    asked = [(prompt, sampler.sample(types.ModelInput.from_ints(prompt), GROUP, params)) for prompt in prompts(step)]
    groups = [(prompt, answer.result(LIMIT_S).sequences) for prompt, answer in asked]
    sampled = time.perf_counter()
    work = trainer.forward_backward(grouped(types, groups), "importance_sampling")
    update = trainer.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
    work.result(LIMIT_S)
    update.result(LIMIT_S)
    learned = time.perf_counter()
    following = trainer.save_weights_and_get_sampling_client()
    return Step(sampled - began, learned - sampled, time.perf_counter() - learned, following)


def grouped(types: Any, groups: list[tuple[list[int], Any]]) -> list[Any]:
    """Datums with group-normalised advantages; the reward is the share of even token ids."""
    data = []
    for prompt, sequences in groups:
        if len(sequences) != GROUP or any(len(each.tokens) != MAX_TOKENS for each in sequences):
            raise SystemExit(
                f"found lengths {[len(each.tokens) for each in sequences]}; wanted {GROUP} of {MAX_TOKENS}"
            )
        rewards = np.array([np.mean([token % 2 == 0 for token in each.tokens]) for each in sequences])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for each, advantage in zip(sequences, advantages.tolist(), strict=True):
            ids, before = prompt + list(each.tokens), len(prompt) - 1
            inputs = {
                "target_tokens": ids[1:],
                "logprobs": [0.0] * before + list(each.logprobs),
                "advantages": [0.0] * before + [advantage] * MAX_TOKENS,
            }
            data.append(types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs))
    return data


def batch() -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Inputs and targets of DATUMS datums of LENGTH tokens."""
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (DATUMS, LENGTH + 1))
    return ids[:, :-1], ids[:, 1:]


def supervised(types: Any) -> list[Any]:
    """The batch as datums of cross_entropy."""
    weights = np.ones(LENGTH, np.float32)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(inputs.tolist()),
            loss_fn_inputs={"target_tokens": targets, "weights": weights},
        )
        for inputs, targets in zip(*batch(), strict=True)
    ]


def one_pass(trainer: Any, data: list[Any]) -> float:
    """Seconds of one forward_backward."""
    began = time.perf_counter()
    trainer.forward_backward(data, "cross_entropy").result(LIMIT_S)
    return time.perf_counter() - began


def one_token(types: Any, sampler: Any) -> float:
    """Seconds of a sample of one token, the median of several that follow each other."""
    params = types.SamplingParams(max_tokens=1, temperature=1.0)
    prompt = types.ModelInput.from_ints(prompts(0)[0])
    found = []
    for _ in range(TOKEN_REPEATS):
        began = time.perf_counter()
        sampler.sample(prompt, 1, params).result(LIMIT_S)
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def many_prompts(count: int) -> list[list[int]]:
    """`count` different prompts."""
    return [prompt for step in range(1, 1 + -(-count // PROMPTS)) for prompt in prompts(step)][:count]
