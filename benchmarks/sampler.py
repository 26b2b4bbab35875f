"""Tokens per second of the sampler against plain vLLM, and of LoRA against the base, on a random model.

    python benchmarks/sampler.py [--hidden 256 --layers 4 --groups 16 --n 8 --max-tokens 64 --repeats 5 --dtype float32]

All engines have the same arguments and live side by side; repetitions alternate between them, so that a busy machine
is busy for all. Prints one JSON object of medians, by the clock and by the processor time of all processes together;
where other work shares the machine, only the second can be trusted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from rlsys.config import ModelSection, SamplerSection
from rlsys.engine.requests import engine_params, group_seeds
from rlsys.engine.start import engine_processes
from rlsys.rollouts import offsets_of
from rlsys.sampler import Sampler, preload, prepare_environment
from rlsys.types import SamplingParams
from rlsys.weights import AdapterSnapshot, WeightUpdate, snapshot_of


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name, value in {
        "hidden": 256, "layers": 4, "vocab": 1024, "rank": 16, "groups": 16, "n": 8, "prompt-tokens": 40,
        "max-tokens": 64, "repeats": 5, "threads": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args()


def make_model(folder: Path, options: argparse.Namespace) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def random_adapter(folder: Path, options: argparse.Namespace) -> AdapterSnapshot:
    from transformers import AutoModelForCausalLM

    tensors = {}
    for name, module in AutoModelForCausalLM.from_pretrained(folder).named_modules():
        if name.endswith("_proj"):
            out, inside = module.weight.shape
            tensors[f"{name}.lora_A"] = torch.randn(options.rank, inside) * 0.02
            tensors[f"{name}.lora_B"] = torch.randn(out, options.rank) * 0.02
    return snapshot_of("bench", 0, options.rank, tensors, options.dtype)


def plain_engine(args: dict[str, Any], adapter: AdapterSnapshot | None) -> tuple[Any, Any]:
    """vLLM's own LLM with the sampler's arguments, and its request for the adapter."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    with engine_processes("cpu"):
        llm = LLM(**args)
    if adapter is None:
        return llm, None
    layout = [(slot.name, list(slot.shape), slot.offset, slot.nbytes) for slot in adapter.layout]
    llm.collective_rpc("rlsys_add_adapter", args=(1, adapter.rank, adapter.dtype, layout, adapter.buffer.tobytes()))
    return llm, LoRARequest("bench", 1, "bench")


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    length = options.prompt_tokens + options.max_tokens
    model = ModelSection(path=str(folder), dtype=options.dtype, max_length=length)
    section = SamplerSection(kv_cache_gb=0.5, threads=options.threads, max_lora_rank=options.rank)
    prepare_environment(section)
    preload()
    adapter = random_adapter(folder, options)
    sampler = Sampler(name="bench", base=folder, model=model, section=section, seed=0)
    await sampler.start()
    canary = np.arange(20, dtype=np.int32)
    nothing = np.zeros(19, np.float32)
    loaded = await sampler.load(WeightUpdate(adapter, canary, nothing, nothing + 100), bound=float("inf"))

    same = sampler.engine_arguments()
    stock = {name: value for name, value in same.items() if name != "worker_cls"}
    no_lora = {name: value for name, value in stock.items() if "lora" not in name and name != "worker_extension_cls"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # as LLM runs by default: its engine in a process of its own
    plain, plain_request = plain_engine(same, adapter)
    stock_lora, stock_request = plain_engine(stock, adapter)
    bare, _ = plain_engine(no_lora, None)

    draw = np.random.default_rng(0)
    problems = np.arange(options.groups)
    prompt_tokens = draw.integers(2, options.vocab, options.groups * options.prompt_tokens).astype(np.int32)
    offsets = offsets_of([options.prompt_tokens] * options.groups)
    prompts = [{"prompt_token_ids": row.tolist()} for row in prompt_tokens.reshape(options.groups, -1)]
    params = SamplingParams(max_tokens=options.max_tokens, seed=1, stop=[])
    unseeded = SamplingParams(max_tokens=options.max_tokens, stop=[])
    each = [engine_params(params, options.n, seed, sampler._about) for seed in group_seeds(1, problems)]
    free = [engine_params(unseeded, options.n, 0, sampler._about) for _ in problems]
    for one in free:
        one.seed = None

    def ours(run_id: str | None, version: int) -> Callable[[], Awaitable[Any]]:
        return lambda: sampler.sample(problems, prompt_tokens, offsets, options.n, params, run_id, version)

    def theirs(llm: Any, request: Any, sampling: list[Any]) -> Callable[[], Awaitable[Any]]:
        async def generate() -> Any:
            return llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)

        return generate

    variants: dict[str, Callable[[], Awaitable[Any]]] = {
        "sampler_base": ours(None, -1),
        "plain_base": theirs(plain, None, each),
        "plain_base_unseeded": theirs(plain, None, free),
        "plain_base_without_lora_slots": theirs(bare, None, each),
        "sampler_lora": ours("bench", 0),
        "plain_lora_by_blocks": theirs(plain, plain_request, each),
        "plain_lora_stock": theirs(stock_lora, stock_request, each),
    }
    total = options.groups * options.n * options.max_tokens
    clock: dict[str, list[float]] = {name: [] for name in variants}
    processor: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):
        for name, variant in variants.items():
            began, spent = time.perf_counter(), processor_seconds()
            await variant()
            if repeat:  # the first warms up
                clock[name].append(total / (time.perf_counter() - began))
                processor[name].append(total / (processor_seconds() - spent))
    await sampler.stop()
    return {
        "options": vars(options),
        "tokens_per_s": summary(clock),
        "tokens_per_processor_s": summary(processor),
        "sampler_start_s": round(sampler.stats().start_s, 1),
        "load_ms": round(loaded.seconds * 1000, 1),
    }


def processor_seconds() -> float:
    """Of this process and all below it."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def summary(speeds: dict[str, list[float]]) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = {
        "sampler / plain, base": median["sampler_base"] / median["plain_base"],
        "sampler / plain, LoRA": median["sampler_lora"] / median["plain_lora_by_blocks"],
        "LoRA / base, sampler": median["sampler_lora"] / median["sampler_base"],
        "LoRA / base without LoRA slots": median["plain_lora_by_blocks"] / median["plain_base_without_lora_slots"],
        "stock LoRA / base without LoRA slots": median["plain_lora_stock"] / median["plain_base_without_lora_slots"],
    }
    return {name: round(value) for name, value in median.items()} | {
        name: round(value, 3) for name, value in ratio.items()
    }


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        print(json.dumps(asyncio.run(measure(options, Path(folder))), indent=2))


if __name__ == "__main__":
    main()
