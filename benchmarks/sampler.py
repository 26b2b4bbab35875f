"""Completion tokens per second of the sampler actor: without an adapter against vLLM, and with an adapter.

    python -m benchmarks.sampler                          # bf16, one thread, three models: about 4 minutes
    python -m benchmarks.sampler --dtypes float32         # the same once more in fp32
    python -m benchmarks.sampler --threads 2
    python -m benchmarks.sampler --models smollm2 --threads 2 --gsm8k ../gsm8k   # the real model

Writes two rows per model, dtype and number of threads.

sampler_base_*: the actor, called as in a job (through Ray, from a driver that fetches only the counts), with an
untrained adapter, as a job evaluates its base. Against `LLM.generate` of vLLM with the same arguments but without LoRA.
Also shown: `LLM.generate` with LoRA enabled and no adapter.

sampler_lora_*: the actor with one trained adapter (rank 16 on the seven linear modules) against the same actor and
engine without it. Also shown: stock vLLM with LoRA against stock vLLM without an adapter, measured once.

Held equal: model (random weights, except smollm2), dtype, threads, prompts (new ones in every repetition, the same for
all sides), lengths (no early stop), seeds, sampling parameters with log-probabilities of the sampled tokens, engine
arguments except LoRA and the worker, and therefore the prefix cache. The completions of a prompt are one request with n
on both sides. vLLM's LLM runs its engine in a separate process, as is its default.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.cluster.ray_cluster import cluster, threads_env
from actors.faults.actor_calls import wait
from actors.hosting.sampler_body import SampleRequest
from actors.sampler_actor import SamplerActor
from benchmarks.adapters import random_problems, random_snapshot, write_adapter
from benchmarks.real import described, prompts_of, real_model
from benchmarks.rows import Row, Target, by_turns, finish
from benchmarks.shapes import S54, TINY, write_model
from rlsys.config import ClusterSection, JobConfig, ModelSection, RunSection, SamplerSection
from rlsys.sampler.engine import Sampler, preload, prepare_environment
from rlsys.sampler.engine_start import engine_processes
from rlsys.sampler.requests import BaseModel, engine_params, group_seeds
from rlsys.types import Array, SamplingParams
from rlsys.weight_sync.update import AdapterSnapshot, WeightUpdate

QUICKSTART = {
    "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320,
}  # fmt: skip
N, PROMPT_TOKENS, RANK = 8, 40, 16


@dataclass(frozen=True, slots=True)
class Case:
    """`shape`: of random weights; None: the real model. `target`: of the actor without adapter over LLM.generate."""

    shape: Mapping[str, int] | None
    groups: int  # prompts of a repetition, each with N completions
    length: int  # tokens of a completion
    kv_cache_gb: float = 0.5
    target: float = 0.95


MODELS = {
    "quickstart": Case(QUICKSTART, 16, 48),
    "tiny": Case(TINY, 16, 48),
    "s54": Case(S54, 16, 32),
    "smollm2": Case(None, 8, 200, 1.0, 1.2),
}
LIMIT_S = 900.0
RUN = "bench"
UNTRAINED, TRAINED = 0, 1  # versions
ACTOR, ACTOR_LORA = "actor, no adapter", "actor, one adapter"
PLAIN, PLAIN_SLOTS = "LLM.generate, no LoRA", "LLM.generate, LoRA enabled, no adapter"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["quickstart", "tiny", "s54"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gsm8k", type=Path, help="folder with its train.jsonl and test.jsonl, for smollm2")
    parser.add_argument("--problems", type=int, help="prompts of a repetition, in the place of the model's own number")
    parser.add_argument("--tokens", type=int, help="of a completion, in the place of the model's own number")
    return parser.parse_args()


class Measuring:
    """All engines of one model."""

    def __init__(self, folder: Path, case: Case, dtype: str, threads: int, repeats: int, gsm8k: Path | None) -> None:
        self.case, self.base = case, folder / "base"
        count = case.groups * (repeats + 3)  # a warm-up, and two turns of stock vLLM
        if case.shape is None:
            self.base = real_model()
            prompts = prompts_of(self.base, gsm8k)
            self.problems, self.about_prompts = prompts.problems, prompts.about
            if len(self.problems) < count:
                raise SystemExit(f"{prompts.source}: found {len(self.problems)} prompts; wanted {count}: fewer repeats")
        else:
            write_model(self.base, dict(case.shape), dtype)
            self.problems = random_problems(count, PROMPT_TOKENS, case.shape["vocab_size"])
            self.about_prompts = f"random, {PROMPT_TOKENS} tokens"
        longest = int(np.diff(self.problems.prompt_offsets).max())
        self.config = JobConfig(
            run=RunSection(name=RUN),
            model=ModelSection(path=str(self.base), dtype=dtype, max_length=longest + case.length),
            sampler=SamplerSection(kv_cache_gb=case.kv_cache_gb, threads=threads, max_lora_rank=RANK),
        )
        prepare_environment(self.config.sampler)
        preload()
        self.params = SamplingParams(max_tokens=case.length, seed=1, stop=[])
        self.trained = random_snapshot(self.base, RUN, TRAINED, RANK, dtype)
        self.actor = self._start_actor()
        self.llm_plain, self.llm_slots = self._start_llms(folder / "adapter")

    def _start_actor(self) -> Any:
        """Start the sampler actor as in a job, with both versions loaded."""
        section = self.config.sampler
        options = {"num_cpus": section.num_cpus, "max_concurrency": 1000, "runtime_env": threads_env(section.threads)}
        actor = ray.remote(SamplerActor).options(**options).remote(self.config, 0)
        wait(actor.start.remote(str(self.base)), LIMIT_S, "sampler: starting vLLM")
        shared = ray.put(self.problems)
        wait(actor.take.remote(shared, shared), LIMIT_S, "sampler: taking the problems")
        untrained = random_snapshot(self.base, RUN, UNTRAINED, RANK, self.config.model.dtype, size=0.0)
        for snapshot in (untrained, self.trained):
            wait(actor.load.remote(_unproven(snapshot), float("inf")), LIMIT_S, "sampler: loading")
        return actor

    def _start_llms(self, adapter: Path) -> tuple[Any, Any]:
        """vLLM's own LLM without LoRA, and with it, each with vLLM's own worker."""
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        sampler = Sampler(name=RUN, base=self.base, model=self.config.model, section=self.config.sampler, seed=0)
        # a base in bfloat16 loads as float32 without a rounding of its weights
        ours = ("worker_cls", "worker_extension_cls", "load_format")
        self.engine_arguments = sampler.engine.arguments()
        slots = {name: value for name, value in self.engine_arguments.items() if name not in ours}
        plain = {name: value for name, value in slots.items() if "lora" not in name}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        with engine_processes("cpu"):
            llms = LLM(**plain), LLM(**slots)
        write_adapter(self.trained, adapter)
        self.stock_request = LoRARequest(RUN, 1, str(adapter))
        return llms

    def sides(self) -> Mapping[str, Callable[[], float]]:
        return {
            ACTOR: self.timed(self.ours(UNTRAINED)),
            PLAIN: self.timed(self.theirs(self.llm_plain, None)),
            ACTOR_LORA: self.timed(self.ours(TRAINED)),
            PLAIN_SLOTS: self.timed(self.theirs(self.llm_slots, None)),
        }

    def stock(self) -> float:
        """Speed of stock vLLM with the adapter, relative to its speed without."""
        request = self.theirs(self.llm_slots, self.stock_request)
        request(np.arange(1))  # loads it
        return self.timed(request)() / self.timed(self.theirs(self.llm_slots, None))()

    def timed(self, sample: Callable[[Array], int]) -> Callable[[], float]:
        """A side, with a next batch of problems at each turn."""
        groups = self.case.groups
        firsts = itertools.count(0, groups)

        def side() -> float:
            first = next(firsts)
            ids = np.arange(first, first + groups)
            began = time.perf_counter()
            tokens = sample(ids)
            seconds = time.perf_counter() - began
            if tokens != groups * N * self.case.length:
                raise SystemExit(f"{tokens} tokens; wanted {groups * N * self.case.length}")
            return tokens / seconds

        return side

    def ours(self, version: int) -> Callable[[Array], int]:
        def sample(ids: Array) -> int:
            _, counts = self.actor.sample.remote(
                SampleRequest("train", ids, np.zeros_like(ids), N, self.params, version)
            )
            return int(wait(counts, LIMIT_S, "sampler: sampling")["tokens"])

        return sample

    def theirs(self, llm: Any, request: Any) -> Callable[[Array], int]:
        about = BaseModel(self.base)

        def generate(ids: Array) -> int:
            tokens, offsets = self.problems.select(ids)
            prompts = [{"prompt_token_ids": row.tolist()} for row in np.split(tokens, offsets[1:-1])]
            each = [engine_params(self.params, N, seed, about) for seed in group_seeds(1, ids)]
            outputs = llm.generate(prompts, each, lora_request=request, use_tqdm=False)
            return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

        return generate

    def stop(self) -> None:
        wait(self.actor.stop.remote(), LIMIT_S, "sampler: stopping")
        ray.kill(self.actor)
        for llm in (self.llm_plain, self.llm_slots):
            llm.llm_engine.engine_core.shutdown()


def _unproven(snapshot: AdapterSnapshot) -> WeightUpdate:
    """Weights are random, so the canary has nothing to be compared with."""
    nothing = np.zeros(19, np.float32)
    return WeightUpdate(snapshot, np.arange(2, 22, dtype=np.int32), nothing, nothing + 100, 1e9)


def measure(name: str, case: Case, dtype: str, threads: int, repeats: int, gsm8k: Path | None) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="rlsys-sampler-") as folder:
        engines = Measuring(Path(folder), case, dtype, threads, repeats, gsm8k)
        found = by_turns(engines.sides(), repeats)
        stock = engines.stock()
        engines.stop()
        arguments = engines.engine_arguments
    equal = {
        "model": case.shape or described(engines.base), "dtype": dtype, "threads": threads, "prompts": case.groups,
        "completions of each": N, "prompt tokens": engines.about_prompts, "completion tokens": case.length,
        "tokens of a repetition": case.groups * N * case.length, "temperature": 1.0, "logprobs": "sampled token",
        "prefix cache": arguments["enable_prefix_caching"], "tokens of a block": arguments["block_size"],
        "KV cache, GiB": case.kv_cache_gb,
    }  # fmt: skip
    short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    what = f"{name}, {short}, {threads} thread{'s' if threads > 1 else ''}"
    common: dict[str, Any] = {
        "command": f"python -m benchmarks.sampler --models {name} --dtypes {dtype} --threads {threads}",
        "unit": "tokens/s",
    }
    suffix = f"{name}_{short}_{threads}t"
    return [
        Row(
            name=f"sampler_base_{suffix}",
            title=f"sampler actor, no adapter ({what})",
            sides={side: found[side] for side in (ACTOR, PLAIN, PLAIN_SLOTS)},
            targets=[Target(ACTOR, PLAIN, case.target, ">=")],
            equal=equal,
            **common,
        ),
        Row(
            name=f"sampler_lora_{suffix}",
            title=f"sampler actor, one LoRA adapter ({what})",
            sides={side: found[side] for side in (ACTOR_LORA, ACTOR)},
            targets=[Target(ACTOR_LORA, ACTOR, 0.65, ">=")],
            equal=equal | {"rank": RANK, "modules": "seven linears"},
            more={"stock vLLM, one adapter / without": round(stock, 3)},
            **common,
        ),
    ]


def main() -> None:
    os.environ.pop("RAY_ADDRESS", None)
    options = arguments()
    with cluster(ClusterSection()):
        for dtype, name in itertools.product(options.dtypes, options.models):
            case = MODELS[name]
            case = replace(case, groups=options.problems or case.groups, length=options.tokens or case.length)
            for row in measure(name, case, dtype, options.threads, options.repeats, options.gsm8k):
                finish(row)


if __name__ == "__main__":
    main()
