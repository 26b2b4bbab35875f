"""Tokens per second of the sampler actor against plain vLLM `LLM.generate`, and of LoRA against the base.

    python benchmarks/sampler.py                   # the quickstart's model: hidden 96, 3 layers, vocabulary 320
    python benchmarks/sampler.py --preset small    # hidden 256, 4 layers, vocabulary 1024

The actor is asked as a job asks it: through Ray, from a driver that fetches the counts and leaves the completions in
the object store. Held equal: the random model, one machine, engine arguments, threads, prompts, seeds, lengths (nothing
stops early) and the adapter. All engines live side by side and repetitions alternate between them, so that a busy
machine is busy for all. Plain vLLM runs with the sampler's CPU worker and LoRA kernels, and with vLLM's own ("stock").
Prints one JSON object: by the clock, and by the processor time of all processes together, which is the one to trust
where other work shares the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from actors.calls import wait
from actors.cluster import cluster, threads_env
from actors.sampler_actor import SamplerActor
from rlsys.config import ClusterSection, JobConfig, ModelSection, RunSection, SamplerSection
from rlsys.engine.requests import BaseModel, engine_params, group_seeds
from rlsys.engine.start import engine_processes
from rlsys.problems import Problem, ProblemSet, encode
from rlsys.sampler import Sampler, preload, prepare_environment
from rlsys.types import SamplingParams
from rlsys.weights import AdapterSnapshot, WeightUpdate, snapshot_of

PRESETS = {
    "quickstart": {
        "hidden": 96, "layers": 3, "head-dim": 32, "vocab": 320, "groups": 32, "n": 8, "prompt-tokens": 40,
        "max-tokens": 48, "rank": 16, "repeats": 9, "threads": 1,
    },
    "small": {
        "hidden": 256, "layers": 4, "head-dim": 64, "vocab": 1024, "groups": 16, "n": 8, "prompt-tokens": 40,
        "max-tokens": 64, "rank": 16, "repeats": 5, "threads": 1,
    },
}  # fmt: skip
LIMIT_S = 300.0
RUN = "bench"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quickstart")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name in PRESETS["quickstart"]:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name.replace("-", "_")) is None:
            setattr(options, name.replace("-", "_"), value)
    return options


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
        head_dim=options.head_dim,
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
    return snapshot_of(RUN, 0, options.rank, tensors, options.dtype)


def random_problems(options: argparse.Namespace) -> ProblemSet:
    draw = np.random.default_rng(0)
    return encode(
        [Problem("random tokens", "")] * options.groups,
        lambda _: draw.integers(2, options.vocab, options.prompt_tokens).tolist(),
    )


def start_actor(config: JobConfig, folder: Path, problems: ProblemSet, adapter: AdapterSnapshot) -> tuple[Any, float]:
    """The sampler actor as a job makes it, and how long it took to install the adapter (s)."""
    section = config.sampler
    options = {"num_cpus": section.num_cpus, "max_concurrency": 1000, "runtime_env": threads_env(section.threads)}
    actor = ray.remote(SamplerActor).options(**options).remote(config, 0)
    shared = ray.put(problems)
    wait(actor.start.remote(str(folder), shared, shared), LIMIT_S, "sampler: starting vLLM")
    nothing = np.zeros(19, np.float32)  # the weights are random, so the canary has nothing to compare with
    update = WeightUpdate(adapter, np.arange(20, dtype=np.int32), nothing, nothing + 100)
    return actor, wait(actor.load.remote(update, float("inf")), LIMIT_S, "sampler: loading").seconds


def plain_engine(args: Mapping[str, Any], adapter: AdapterSnapshot | None) -> tuple[Any, Any]:
    """vLLM's own LLM with the sampler's arguments, and its request for the adapter."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    with engine_processes("cpu"):
        llm = LLM(**args)
    if adapter is None:
        return llm, None
    layout = [(slot.name, list(slot.shape), slot.offset, slot.nbytes) for slot in adapter.layout]
    llm.collective_rpc("rlsys_add_adapter", args=(1, adapter.rank, adapter.dtype, layout, adapter.buffer.tobytes()))
    return llm, LoRARequest(RUN, 1, RUN)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    length = options.prompt_tokens + options.max_tokens
    config = JobConfig(
        run=RunSection(name=RUN),
        model=ModelSection(path=str(folder), dtype=options.dtype, max_length=length),
        sampler=SamplerSection(kv_cache_gb=0.5, threads=options.threads, max_lora_rank=options.rank),
    )
    prepare_environment(config.sampler)
    preload()
    adapter, problems, ids = random_adapter(folder, options), random_problems(options), np.arange(options.groups)
    params = SamplingParams(max_tokens=options.max_tokens, seed=1, stop=[])
    actor, load_s = start_actor(config, folder, problems, adapter)

    same = Sampler(name=RUN, base=folder, model=config.model, section=config.sampler, seed=0).engine_arguments()
    stock = {name: value for name, value in same.items() if name != "worker_cls"}
    no_lora = {name: value for name, value in stock.items() if "lora" not in name and name != "worker_extension_cls"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # as LLM runs by default: its engine in a process of its own
    plain, plain_request = plain_engine(same, adapter)
    stock_lora, stock_request = plain_engine(stock, adapter)
    bare, _ = plain_engine(no_lora, None)

    prompts = [{"prompt_token_ids": row.tolist()} for row in problems.prompt_tokens.reshape(options.groups, -1)]
    about = BaseModel(folder)
    each = [engine_params(params, options.n, seed, about) for seed in group_seeds(1, ids)]

    def ours(run_id: str | None, version: int) -> Callable[[], Any]:
        def sample() -> Any:
            _, counts = actor.sample.remote("train", ids, options.n, params, version)
            return wait(counts, LIMIT_S, "sampler: sampling")["tokens"]

        return sample

    def theirs(llm: Any, request: Any) -> Callable[[], Any]:
        def generate() -> int:
            outputs = llm.generate(prompts, each, lora_request=request, use_tqdm=False)
            return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

        return generate

    variants = {
        "actor_lora": ours(RUN, 0),
        "plain_lora": theirs(plain, plain_request),
        "plain_lora_stock": theirs(stock_lora, stock_request),
        "plain_base": theirs(plain, None),
        "plain_base_without_lora_slots": theirs(bare, None),
    }
    clock, processor = alternate(variants, options.repeats, options.groups * options.n * options.max_tokens)
    wait(actor.stop.remote(), LIMIT_S, "sampler: stopping")
    return {
        "options": vars(options),
        "machine": {"cores": os.cpu_count(), "load_average_1m": round(os.getloadavg()[0], 2)},
        "tokens_per_s": summary(clock),
        "tokens_per_processor_s": summary(processor),
        "load_ms": round(load_s * 1000, 1),
    }


def alternate(
    variants: Mapping[str, Callable[[], int]], repeats: int, total: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Tokens per second of each variant in each repetition: by the clock, and by processor time."""
    clock: dict[str, list[float]] = {name: [] for name in variants}
    processor: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, variant in variants.items():
            began, spent = time.perf_counter(), processor_seconds()
            tokens = variant()
            if tokens != total:
                raise SystemExit(f"{name}: {tokens} tokens; wanted {total}")
            if repeat:  # the first warms up
                clock[name].append(total / (time.perf_counter() - began))
                processor[name].append(total / (processor_seconds() - spent))
    return clock, processor


def processor_seconds() -> float:
    """Of this process and all below it, Ray's included."""
    spent = 0.0
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        times = process.cpu_times()
        spent += times.user + times.system
    return spent


def summary(speeds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Median and range of each variant, and of ratios within a repetition."""

    def ratio(above: str, below: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(speeds[above], speeds[below], strict=True)], 3)

    return {name: spread(values, 0) for name, values in speeds.items()} | {
        "actor / plain, LoRA": ratio("actor_lora", "plain_lora"),
        "LoRA / base without LoRA slots": ratio("plain_lora", "plain_base_without_lora_slots"),
        "stock LoRA / base without LoRA slots": ratio("plain_lora_stock", "plain_base_without_lora_slots"),
    }


def spread(values: list[float], digits: int) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def main() -> None:
    os.environ.pop("RAY_ADDRESS", None)  # processor time is counted on this machine only
    options = arguments()
    with tempfile.TemporaryDirectory() as folder, cluster(ClusterSection()):
        make_model(Path(folder), options)
        print(json.dumps(measure(options, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
