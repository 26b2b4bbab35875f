"""One learner and one vLLM engine in one process, without Ray.

A part of `make gpu-loop` (benchmarks/gpu_loop.py). The base has random weights and the shape of Qwen3-0.6B (on a CPU a
tiny shape). Rewards are random, because this part checks the loop and not learning.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_journal import Notes
from benchmarks.gpu_loop_part import GIB, NOT_ON_CPU, part_options, run_and_exit
from benchmarks.gpu_parts import QUICK, QWEN3_0_6B, write_base
from rlsys.advantages import to_minibatches
from rlsys.architectures.model_shape import model_shape
from rlsys.config import JobConfig, parse_config
from rlsys.errors import RlsysError
from rlsys.learner.learner import Learner
from rlsys.learner.policy import Policy
from rlsys.planning.memory import learner_memory, sampler_memory
from rlsys.rollouts import Rollouts, offsets_of
from rlsys.sampler.engine import Sampler, preload, prepare_environment
from rlsys.types import Array
from rlsys.weight_sync.canary import LONG_TOKENS
from rlsys.weight_sync.update import WeightUpdate

STEPS = 3
RUN = "engine"
JOB = f"""
run: {{name: {RUN}, seed: 1}}
lora: {{rank: 16, alpha: 32}}
tracking: {{wandb: disabled}}
"""
CUDA = """
model.dtype=bfloat16 model.max_length=1280 learner.num_gpus=0.5 learner.token_budget=8192
sampler.num_gpus=0.5 sampler.colocate=true sampler.gpu_memory_utilization=0.3 sampler.enforce_eager=true
rl.problems_per_step=16 rl.samples_per_problem=8 rl.sampling.max_tokens=256 eval.max_tokens=256
"""
CPU = """
model.dtype=float32 model.max_length=256 sampler.colocate=true sampler.kv_cache_gb=0.1 sampler.max_num_seqs=64
sampler.max_num_batched_tokens=512 rl.problems_per_step=6 rl.samples_per_problem=4 rl.sampling.max_tokens=24
eval.max_tokens=24
"""
PROMPTS = {"cuda": (40, 400, 1000), "cpu": (16, 60, 200)}  # shortest, longest, and one that reaches late positions


@dataclass
class Loop:
    """Sampler and learner with their configuration, and the facts of their steps."""

    notes: Notes
    config: JobConfig
    policy: Policy
    sampler: Sampler
    device: str

    async def step(self, number: int, prompts: Array, offsets: Array) -> None:
        update = self.policy.publish()
        await self._load(update)
        rollouts = await self._sample(number, prompts, offsets, update)
        canary = await self._canary(update)
        await self._sleep()
        self._learn(number, rollouts)
        await self._wake(update, canary)

    async def _load(self, update: WeightUpdate) -> None:
        answer = await self.sampler.load(update)
        version = update.snapshot.version
        self.notes.fact(f"version {version}: installed and attested", answer.seconds, "s")
        self.notes.fact(f"version {version}: adapter sent", update.snapshot.buffer.nbytes / 2**20, "MiB")
        name = f"version {version}: canary, sampler to learner"
        self.notes.check(name, answer.distance_new, update.bound, unit="nats", separation=answer.separation)

    async def _sample(self, number: int, prompts: Array, offsets: Array, update: WeightUpdate) -> Rollouts:
        rl = self.config.rl
        began = time.perf_counter()
        rollouts = await self.sampler.sample(
            np.arange(rl.problems_per_step), prompts, offsets, rl.samples_per_problem, rl.sampling.params(seed=number),
            RUN, update.snapshot.version,
        )  # fmt: skip
        tokens = len(rollouts.tokens)
        rate = tokens / (time.perf_counter() - began)
        self.notes.fact(f"step {number}: sampler", rate, "tokens/s", tokens=tokens)
        return rollouts

    def _learn(self, number: int, rollouts: Rollouts) -> None:
        rewards = np.random.default_rng(number).integers(0, 2, len(rollouts.offsets) - 1).astype(np.float32)
        (batch,), *_ = to_minibatches(rollouts, rewards, self.config.rl, 1)
        began = time.perf_counter()
        _, found = self.policy.learn(batch, number, 0, first=True, last=True, on_policy=False)
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        trained, every = found["policy/tokens"], len(batch.tokens)
        self.notes.fact(
            f"step {number}: learner",
            trained / seconds,
            "tokens of completions/s",
            tokens=every,
            seconds=round(seconds, 3),
        )
        bound = self.policy._publisher.bound
        self.notes.check(f"step {number}: mean |p - q|", found["policy/logprob_diff_mean"], bound, unit="nats")
        for name, value in found.items():
            if name.startswith("policy/logprob_diff_") and name.count("_") > 3:
                self.notes.fact(f"step {number}: {name.removeprefix('policy/')}", value, "nats")
        self.notes.check(f"step {number}: gradient norm above 0", found["policy/grad_norm"], 1e-30, ">=")

    async def _canary(self, update: WeightUpdate) -> Array:
        ends = np.array([0, len(update.canary_tokens)])
        return await self.sampler.logprobs(update.canary_tokens, ends, RUN, update.snapshot.version)

    async def _sleep(self) -> None:
        free, began = _free(self.device), time.perf_counter()
        await self.sampler.sleep()
        if self.device == "cpu":
            return
        self.notes.fact("sleep took", time.perf_counter() - began, "s")
        self.notes.check("GPU memory that sleep gave back", (_free(self.device) - free) / GIB, 0.1, ">=", "GiB")

    async def _wake(self, update: WeightUpdate, before: Array) -> None:
        """Check that the engine holds the same version, in its slots and in its forward pass."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
        began = time.perf_counter()
        await self.sampler.wake()
        if self.device == "cuda":
            self.notes.fact("wake took", time.perf_counter() - began, "s")
        snapshot = update.snapshot
        adapter = self.sampler.slots.get(RUN, snapshot.version)
        layout = [(slot.name, list(slot.shape), slot.offset, slot.nbytes) for slot in snapshot.layout]
        (held,) = await self.sampler.engine.call_workers("rlsys_read_back", adapter.id, layout, snapshot.dtype)
        self.notes.check("after sleep and wake: adapter slots have the same hash", held == snapshot.digest, 1, ">=")
        gap = np.abs(await self._canary(update) - before)
        bound = 0.0 if self.device == "cpu" else update.bound
        self.notes.check("after sleep and wake: canary, to before the sleep", float(gap.mean()), bound, unit="nats")


async def measure(options: argparse.Namespace, notes: Notes, scratch: Path) -> None:
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("found no CUDA device; wanted one, or --device cpu")
    shape = QUICK if device == "cpu" else QWEN3_0_6B
    base = scratch / "base"
    dtype = "float32" if device == "cpu" else "bfloat16"
    count = _timed(notes, "base made and written", lambda: write_base(base, shape, dtype, device, 2048, spread=0.05))
    notes.fact("parameters of the base", count)
    config = engine_job(base, device, options.graphs, options.set)
    _predictions(notes, config)
    prepare_environment(config.sampler, device)
    _timed(notes, "vLLM imported, with the private functions that rlsys builds on", lambda: preload(device))
    policy = _timed(notes, "learner loaded", lambda: _policy(base, config, shape["vocab_size"]))
    if device == "cuda":
        notes.fact("GPU memory of the learner at rest", torch.cuda.memory_allocated() / GIB, "GiB")
    sampler = Sampler(
        name="0", base=base, model=config.model, section=config.sampler, seed=0, device=config.sampler_device
    )
    free = _free(device)
    try:
        await sampler.start()
        notes.fact("engine started", sampler.stats().start_s, "s")
        notes.fact("noise of the engine", sampler.stats().noise, "nats")
        if device == "cuda":
            notes.fact("GPU memory of the engine, KV cache included", (free - _free(device)) / GIB, "GiB")
        await _probe(notes, policy, sampler)
        loop = Loop(notes, config, policy, sampler, device)
        for number in range(1, STEPS + 1):
            await loop.step(number, *draw_prompts(config, shape["vocab_size"], device))
    finally:
        await sampler.stop()
    if device == "cuda":
        notes.fact("GPU memory of the learner at its peak", torch.cuda.max_memory_allocated() / GIB, "GiB")
    else:
        for name in ("GPU memory of learner and engine", "GPU memory that sleep gave back"):
            notes.fact(name, NOT_ON_CPU)


def engine_job(base: Path, device: str, graphs: bool, overrides: list[str]) -> JobConfig:
    own = (CUDA if device == "cuda" else CPU).split()
    if graphs:
        own = [*(key for key in own if "enforce_eager" not in key), "sampler.enforce_eager=false"]
    return parse_config(f"{JOB}model: {{path: {base}}}\n", [*own, *overrides], source="benchmarks/gpu_loop_engine.py")


def draw_prompts(config: JobConfig, vocabulary: int, device: str) -> tuple[Array, Array]:
    """(tokens, offsets) of the step's prompts; the last one is long."""
    shortest, longest, last = PROMPTS[device]
    random = np.random.default_rng(0)
    lengths = [*random.integers(shortest, longest, config.rl.problems_per_step - 1), last]
    return random.integers(1, vocabulary, sum(lengths)).astype(np.int32), offsets_of(lengths)


def _policy(base: Path, config: JobConfig, vocabulary: int) -> Policy:
    tokens = np.random.default_rng(1).integers(1, vocabulary, LONG_TOKENS).astype(np.int32)
    return Policy(Learner(base, config.model, config.learner), config, tokens)


async def _probe(notes: Notes, policy: Policy, sampler: Sampler) -> None:
    began = time.perf_counter()
    probe = policy.probe()
    notes.fact("probe made by the learner", time.perf_counter() - began, "s")
    began = time.perf_counter()
    try:
        answer = await sampler.probe(probe)
    except RlsysError as error:  # what follows says more about it
        notes.check("probe: sampler and learner compute the same base and adapter", 0.0, 1.0, ">=", note=str(error))
        return
    notes.fact("probe passed", time.perf_counter() - began, "s")
    notes.check(
        "probe: sampler to learner",
        answer.distance_new,
        probe.update.bound,
        unit="nats",
        to_base=answer.distance_previous,
    )


def _predictions(notes: Notes, config: JobConfig) -> None:
    """Predictions of `rlsys plan`, without imports."""
    dims = model_shape(config.model)
    for role in (learner_memory(config, dims), sampler_memory(config, dims)):
        unit = "GiB" if config.learner.device == "cuda" else "GiB of the process"
        notes.fact(f"rlsys plan: peak of the {role.role}", role.peak.total / GIB, unit, phase=role.peak.name)


def _timed(notes: Notes, name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    found = work()
    notes.fact(name, time.perf_counter() - began, "s")
    return found


def _free(device: str) -> int:
    """Free bytes of the GPU."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def main() -> None:
    def work(options: argparse.Namespace, notes: Notes) -> None:
        with tempfile.TemporaryDirectory(prefix="rlsys-gpu-loop-") as scratch:
            asyncio.run(measure(options, notes, Path(scratch)))

    run_and_exit(part_options("--graphs"), work)


if __name__ == "__main__":  # vLLM's process imports this module again
    main()
