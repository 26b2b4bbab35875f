"""Overhead of the client API: pipelining, custom losses at learner and caller, several runs on one base. Runs on a CPU.

    python benchmarks/client.py

A random Qwen3 (2 layers, vocabulary 40,960) on a local Ray; variants of a row alternate within each repetition, and all
use the same data. Prints one JSON object: seconds as median and range, and ratios of medians.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rlsys
from rlsys import types
from rlsys.config import ClusterSection, LearnerSection, SamplerSection

REPEATS = 7
RUNS, STEPS = 8, 3
VOCABULARY = 40_960
ADAM = types.AdamParams(1e-4)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        make_model(base)
        config = rlsys.ServiceConfig(
            models={"tiny": str(base)},
            checkpoints=scratch,
            cluster=ClusterSection(num_cpus=2, object_store_gb=0.3),
            learner=LearnerSection(num_cpus=0.5, token_budget=1024),
            sampler=SamplerSection(num_cpus=0.5, kv_cache_gb=0.1, max_num_seqs=64, max_num_batched_tokens=512),
            max_length=256,
        )
        with rlsys.ServiceClient(config) as service:
            print(json.dumps(measure(service), indent=2))


def measure(service: rlsys.ServiceClient) -> dict[str, Any]:
    trainer = service.create_lora_training_client("tiny", rank=8)
    runs = [service.create_lora_training_client("tiny", rank=1 + i, seed=i) for i in range(RUNS)]
    short, pair, fits, does_not_fit = datums(1, 16), datums(2, 100), datums(8, 100), datums(24, 100)

    def wait(futures: Sequence[Any]) -> None:
        for future in futures:
            future.result(300)

    def step(client: Any, data: Any) -> list[Any]:
        return [client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)]

    def losses(data: Any) -> dict[str, Callable[[], None]]:
        return {
            "built_in": lambda: wait([trainer.forward_backward(data, "cross_entropy")]),
            "shipped": lambda: wait([trainer.forward_backward_custom(data, negative_sum)]),
            "caller": lambda: wait([trainer.forward_backward_custom(data, negative_sum, where="caller")]),
        }

    def waiting() -> None:
        for _ in range(5):
            wait([trainer.forward_backward(short, "cross_entropy")])
            wait([trainer.optim_step(ADAM)])

    def one_after_the_other() -> None:
        for run in runs:
            for _ in range(STEPS):
                wait(step(run, pair))

    rows: dict[str, dict[str, Callable[[], None]]] = {
        "5 steps of 16 tokens": {
            "waiting": waiting,
            "pipelined": lambda: wait([future for _ in range(5) for future in step(trainer, short)]),
        },
        "custom loss, 800 tokens, fits the budget of 1024": losses(fits),
        "custom loss, 2400 tokens, does not fit": losses(does_not_fit),
        f"{RUNS} runs x {STEPS} steps of 200 tokens": {
            "one_after_the_other": one_after_the_other,
            "at_once": lambda: wait([future for _ in range(STEPS) for run in runs for future in step(run, pair)]),
        },
    }
    return {row: timed(variants) for row, variants in rows.items()}


def timed(variants: dict[str, Callable[[], None]]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(REPEATS + 1):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    first = statistics.median(next(iter(seconds.values())))
    return {
        name: {
            "median_s": round(statistics.median(found), 4),
            "range_s": [round(min(found), 4), round(max(found), 4)],
            "to_first": round(statistics.median(found) / first, 3),
        }
        for name, found in seconds.items()
    }


def negative_sum(data: Any, logprobs: Any) -> Any:
    """cross_entropy with weights of 1, as a custom loss."""
    return -sum(each.sum() for each in logprobs), {}


def datums(count: int, length: int) -> list[types.Datum]:
    rows = [[(i * 7 + j * 31) % VOCABULARY for j in range(length + 1)] for i in range(count)]
    return [
        types.Datum(types.ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:], "weights": [1.0] * length})
        for row in rows
    ]


def make_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0").save_pretrained(folder)


if __name__ == "__main__":
    main()
