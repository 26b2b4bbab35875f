"""Seconds from an optimizer step until a sampler has attested the new version, against the sum of the necessary parts.

    python -m benchmarks.weight_sync                   # S54 in bf16, ranks 8, 32 and 128: under 4 minutes
    python -m benchmarks.weight_sync --ranks 8 --repeats 9

One learner and one sampler, driven by the stages of a job, LearnerGroup.publish and SamplerPool.load. All adapter slots
of the sampler hold older versions, so one is evicted. Before every repetition the learner makes a real step (untimed).
The sum of the necessary parts is measured in the same repetition and processes: a copy of the adapter's bytes between
two arrays written before; vLLM's add_lora of the same adapter from a file in /dev/shm with a new id into the same
engine, with the eviction and without writing the file; one empty Ray call; and the canary's forward passes of learner
and engine. Also shown: the seconds from the end of the sync until the driver receives a first token of the new version.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray

import actors.stages.learner_group
import actors.stages.sampler_pool.membership
from actors.cluster.placement import Placement
from actors.cluster.ray_cluster import cluster
from actors.evaluation import Loaded
from actors.faults.actor_calls import wait
from actors.faults.actor_logs import Failures
from actors.hosting.sampler_body import SamplerBody
from actors.learner_actor import LearnerActor
from actors.sampler_actor import SamplerActor
from actors.stages.learner_group import LearnerGroup, LearnerInit
from actors.stages.sampler_pool.membership import SamplerInit
from actors.stages.sampler_pool.pool import SamplerPool
from benchmarks.adapters import random_problems, write_adapter
from benchmarks.rows import Row, Target, finish, spread
from benchmarks.shapes import S54, TINY, write_model
from rlsys import losses
from rlsys.config import ClusterSection, JobConfig, LoraSection, ModelSection, RunSection, SamplerSection
from rlsys.datums import DatumBatch
from rlsys.protocols import Ref
from rlsys.types import AdamParams, SamplingParams
from rlsys.weight_sync.update import WeightUpdate

MODELS = {"tiny": TINY, "s54": S54}
LIMIT_S = 120.0
RUN = "bench"
FLOOR = ("copy of the bytes", "vLLM's add_lora", "empty Ray call", "canary in the engine", "canary in the learner")


class MeasuredLearner(LearnerActor):
    """The job's learner actor, with additional timings."""

    def step(self) -> None:
        """A real optimizer step on a few random tokens."""
        tokens = np.random.default_rng().integers(2, 1000, 65).astype(np.int32)
        batch = DatumBatch(tokens[:-1], tokens[1:], np.array([0, 64]), {"weights": np.ones(64, np.float32)})
        learner = self.policy.learner
        learner.forward_backward(RUN, batch, losses.resolve("cross_entropy", {}))
        learner.optim_step(RUN, AdamParams(learning_rate=1e-3))

    def canary(self) -> float:
        began = time.perf_counter()
        self.policy._publisher._canary.score(RUN)
        return time.perf_counter() - began

    def snapshot(self) -> float:
        began = time.perf_counter()
        self.policy.learner.snapshot(RUN, self.config.model.dtype)
        return time.perf_counter() - began

    def copy(self, update: WeightUpdate) -> float:
        source = update.snapshot.buffer.copy()
        target = np.ones_like(source)
        began = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - began


class MeasuredBody(SamplerBody):
    """The work of a job's sampler actor, with additional timings."""

    async def empty(self) -> None:
        pass

    async def canary(self, update: WeightUpdate) -> float:
        adapter = self.sampler.slots.get(RUN, update.snapshot.version)
        began = time.perf_counter()
        await self.sampler.scorer.score(update.canary_tokens, adapter)
        return time.perf_counter() - began

    async def add_lora(self, folder: str, number: int) -> float:
        """vLLM's own, into a full engine: the oldest adapter goes."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(f"plain-{number}", 10_000 + number, folder)
        engine = self.sampler.engine.llm
        began = time.perf_counter()
        await engine.add_lora(request)
        seconds = time.perf_counter() - began
        await engine.remove_lora(request.lora_int_id)
        return seconds

    async def make_room(self) -> None:
        """For `add_lora`, which would throw out what the sampler still counts on."""
        while len(self.sampler.slots.keys()) >= self.config.sampler.max_live_adapters:
            await self.sampler.unload(*self.sampler.slots.keys()[0])


class MeasuredSampler(SamplerActor):
    """The job's sampler actor with these calls, which go through its host process as the job's do."""

    body = MeasuredBody

    async def empty(self) -> None:
        await self.host.call("empty")

    async def canary(self, update: WeightUpdate) -> float:
        return await self.host.call("canary", update)

    async def add_lora(self, folder: str, number: int) -> float:
        return await self.host.call("add_lora", folder, number)

    async def make_room(self) -> None:
        await self.host.call("make_room")


@contextmanager
def stages(config: JobConfig) -> Iterator[tuple[LearnerGroup, SamplerPool]]:
    """The job's stages, with only a learner and a sampler."""
    # The stages start the classes of these names, which their modules import without exporting them.
    actors.stages.learner_group.LearnerActor = MeasuredLearner  # type: ignore[attr-defined]
    actors.stages.sampler_pool.membership.SamplerActor = MeasuredSampler  # type: ignore[attr-defined]
    failures, note = Failures(), print
    placement = Placement(config, note)
    learner = LearnerGroup(config, Loaded(None), failures, note)
    samplers = SamplerPool(config, placement, failures, note, renew=_refuse_renewal)
    try:
        rank_seats, sampler_seats = placement.reserve()
        learner.launch(rank_seats)
        samplers.membership.launch(sampler_seats)
        assert config.model.path is not None
        base, problems = config.model.path, Ref[Any](ray.put(random_problems(8, 40, 1000)))
        samplers.membership.begin(base)
        learner.start(LearnerInit(base, problems))
        samplers.membership.start(SamplerInit(base, problems, problems, learner.probe()))
        samplers.load(learner.publish())
        yield learner, samplers
    finally:
        samplers.close()
        learner.close()
        placement.release()


def _refuse_renewal() -> Any:
    raise RuntimeError("an object of this benchmark was lost; run it again")


def measure(name: str, dtype: str, rank: int, repeats: int) -> Row:
    found: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="rlsys-weights-", dir="/dev/shm") as folder:
        base = Path(folder) / "base"
        write_model(base, MODELS[name], dtype)
        config = JobConfig(
            run=RunSection(name=RUN),
            model=ModelSection(path=str(base), dtype=dtype, max_length=128),
            lora=LoraSection(rank=rank),
            sampler=SamplerSection(kv_cache_gb=0.5, max_lora_rank=rank),
        )
        with stages(config) as (learner, samplers):
            for repeat in range(-3, repeats):  # the first fill the engine and warm up
                seconds, nbytes = once(learner, samplers, Path(folder) / f"adapter{repeat}", repeat + 3)
                for part in seconds:
                    if repeat >= 0:
                        found[part].append(seconds[part])
    total = "optimizer step to attested"
    floors = [sum(parts) for parts in zip(*(found[part] for part in FLOOR), strict=True)]
    engine_only = [floor - own for floor, own in zip(floors, found["canary in the learner"], strict=True)]
    short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    milli = {part: [1000 * value for value in values] for part, values in found.items()}
    milli |= {"floor": [1000 * value for value in floors]}
    milli |= {"floor without the learner's canary": [1000 * value for value in engine_only]}
    parts = {part: spread(values) for part, values in milli.items() if part != total and "floor" not in part}
    ratio = statistics.median(a / b for a, b in zip(found[total], engine_only, strict=True))
    return Row(
        name=f"weight_sync_{name}_{short}_r{rank:03d}",
        title=f"weight sync, {name}, {short}, rank {rank}, {nbytes / 1e6:.1f} MB",
        command=f"python -m benchmarks.weight_sync --models {name} --dtypes {dtype} --ranks {rank}",
        unit="ms",
        sides={side: milli[side] for side in (total, "floor", "floor without the learner's canary")},
        targets=[Target(total, "floor", 1.5, "<=")],
        equal={"model": MODELS[name], "dtype": dtype, "rank": rank, "bytes": nbytes, "threads": "1 each"},
        more={"parts, ms": parts, "ratio to the floor without the learner's canary": round(ratio, 2)},
    )


def once(learner: LearnerGroup, samplers: SamplerPool, folder: Path, number: int) -> tuple[dict[str, float], int]:
    """Seconds of the sync and of everything beside it, and the adapter's bytes."""
    (trainer,), sampler = learner.ranks, samplers.members[0].actor
    wait(trainer.step.remote(), LIMIT_S, "learner: a step")
    began = time.perf_counter()
    published = learner.publish()
    halfway = time.perf_counter()
    samplers.load(published)
    done = time.perf_counter()
    first = SamplingParams(max_tokens=1, seed=number, stop=[])
    samplers.wait(samplers.submit("train", np.array([number % 8]), 1, first))
    token = time.perf_counter()
    update = ray.get(published.ref.value)
    write_adapter(update.snapshot, folder)
    wait(sampler.make_room.remote(), LIMIT_S, "sampler: making room")
    add_lora = wait(sampler.add_lora.remote(str(folder), number), LIMIT_S, "sampler: add_lora")
    asked = time.perf_counter()
    ray.get(sampler.empty.remote())
    answered = time.perf_counter()
    return {
        "optimizer step to attested": done - began,
        "its first half, until published": halfway - began,
        "its second half, load": done - halfway,
        "time to first token, after it": token - done,
        "copy of the bytes": wait(trainer.copy.remote(published.ref.value), LIMIT_S, "learner: copying"),
        "vLLM's add_lora": add_lora,
        "empty Ray call": answered - asked,
        "canary in the engine": wait(sampler.canary.remote(published.ref.value), LIMIT_S, "sampler: canary"),
        "canary in the learner": wait(trainer.canary.remote(), LIMIT_S, "learner: canary"),
        "snapshot in the learner": wait(trainer.snapshot.remote(), LIMIT_S, "learner: snapshot"),
    }, published.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["s54"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    with cluster(ClusterSection()):
        for name in options.models:
            for dtype in options.dtypes:
                for rank in options.ranks:
                    finish(measure(name, dtype, rank, options.repeats))


if __name__ == "__main__":
    from benchmarks import weight_sync  # a sampler's host process looks for its class there, not in __main__

    weight_sync.main()
