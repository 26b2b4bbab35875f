"""One engine of two tensor-parallel workers, for real on CPU: it computes as one, and both prove what they hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import ModelSection
from rlsys.errors import ActorDiedError, ActorFailedError, WeightSyncError
from rlsys.rollouts import offsets_of
from rlsys.sampler.engine import Sampler
from rlsys.types import SamplingParams
from tests.engine.tiny_engine import BOUND, LINEARS, MAX_LENGTH, SECTION, VOCAB, Reference
from tests.waiting import until_gone

Run = Callable[..., Any]
TWO = SECTION.model_copy(update={"tensor_parallel_size": 2})
TOKENS = np.random.default_rng(0).integers(2, VOCAB, 100).astype(np.int32)
OFFSETS = offsets_of([40, 60])
PROGRAM = """
import asyncio, sys
from pathlib import Path
from rlsys.config import ModelSection, SamplerSection
from rlsys.sampler.engine import Sampler

async def main(folder):
    section = SamplerSection(kv_cache_gb=0.1, tensor_parallel_size=2)
    model = ModelSection(path=folder, max_length=64)
    sampler = Sampler(name="s", base=Path(folder), model=model, section=section, seed=0)
    await sampler.start()
    print("READY", *[process.pid for process in sampler.engine.llm.engine_core.resources.engine_manager.processes])
    sys.stdout.flush()
    await asyncio.sleep(1e5)

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def pair(reference: Reference, run: Run) -> Iterator[Sampler]:
    from tests.engine.spoiled import SpoiledEngine  # with vLLM, which other processes of `make test` need not import

    model = ModelSection(path=str(reference.folder), max_length=MAX_LENGTH)
    sampler = Sampler(name="pair", base=reference.folder, model=model, section=TWO, seed=5, engine_class=SpoiledEngine)
    run(sampler.start())
    yield sampler
    run(sampler.stop())


@pytest.fixture
def two(pair: Sampler, run: Run) -> Iterator[Sampler]:
    """The engine with no adapter loaded."""
    yield pair
    spoil(pair, None)
    for key in pair.stats().live:
        run(pair.unload(*key))


def spoil(sampler: Sampler, where: tuple[int, str] | None) -> None:
    sampler.engine.spoil = where  # type: ignore[attr-defined]  # of a SpoiledEngine


def test_two_workers_compute_what_one_does(two: Sampler, sampler: Sampler, reference: Reference, run: Run) -> None:
    adapter = reference.adapter(8, 1, targets=[*LINEARS, "lm_head"])
    update = reference.update("a", 1, adapter)
    for each in (sampler, two):
        assert run(each.load(update, BOUND)).digest == update.snapshot.digest
    for which in ((None, -1), ("a", 1)):
        alone, together = (run(each.logprobs(TOKENS, OFFSETS, *which)) for each in (sampler, two))
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
        params = SamplingParams(max_tokens=16, seed=3, stop=[])
        rollouts = run(two.sample(np.array([4]), TOKENS[:20], offsets_of([20]), 3, params, *which))
        whole = [np.concatenate([TOKENS[:20], rollouts.completion(r)]) for r in range(3)]
        scored = run(sampler.logprobs(np.concatenate(whole), offsets_of([36] * 3), *which))
        np.testing.assert_allclose(rollouts.logprobs, scored.reshape(3, 36)[:, 20:].ravel(), rtol=0, atol=1e-5)


def test_each_worker_holds_its_half_of_what_is_split_and_all_of_the_rest(
    two: Sampler, reference: Reference, run: Run
) -> None:
    update = reference.update("a", 1, reference.adapter(4, 1, targets=["k_proj", "down_proj", "lm_head"]))
    run(two.load(update, BOUND))
    layout = [(slot.name, list(slot.shape), slot.offset, slot.nbytes) for slot in update.snapshot.layout]
    held = run(two.engine.call_workers("rlsys_read_part", two.slots.get("a", 1).id, layout, update.snapshot.dtype))
    found = {slot.name: [places[i] for _, places in held] for i, slot in enumerate(update.snapshot.layout)}
    layer = "model.layers.1"
    assert found[f"{layer}.self_attn.k_proj.lora_A"] == [[[0, 4, 0, 64]]] * 2
    assert found[f"{layer}.self_attn.k_proj.lora_B"] == [[[0, 32, 0, 4]], [[32, 64, 0, 4]]]
    assert found[f"{layer}.mlp.down_proj.lora_A"] == [[[0, 4, 0, 64]], [[0, 4, 64, 128]]]
    assert found[f"{layer}.mlp.down_proj.lora_B"] == [[[0, 64, 0, 4]]] * 2
    assert found["lm_head.lora_B"] == [[[0, VOCAB, 0, 4]]] * 2
    assert held[0][0] != held[1][0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_value_that_one_worker_holds_wrong_is_caught(two: Sampler, reference: Reference, run: Run, rank: int) -> None:
    update = reference.update("a", 1, reference.adapter(8, 1))
    spoil(two, (rank, "model.layers.1.mlp.down_proj"))
    with pytest.raises(WeightSyncError, match=f"version 1: the slots of tensor-parallel worker {rank} of 2 have"):
        run(two.load(update, BOUND))
    assert two.stats().live == ()
    spoil(two, None)
    assert run(two.load(update, BOUND)).digest == update.snapshot.digest


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_fails_is_named_and_the_next_answers_are_to_the_next_call(
    two: Sampler, run: Run, rank: int
) -> None:
    with pytest.raises(ActorFailedError, match=rf"sampler pair: fail: worker {rank}: ValueError: on purpose \(spoiled"):
        run(two.engine.call_workers("fail", rank))
    assert run(two.engine.call_workers("fail", 2)) == [0, 1]


def workers_of(engine: int) -> list[int]:
    pids = [int(pid) for pid in Path(f"/proc/{engine}/task/{engine}/children").read_text().split()]
    assert len(pids) == 2
    return pids


def test_the_engine_is_dead_when_one_worker_is(two: Sampler, run: Run) -> None:
    (engine,) = two.engine.llm.engine_core.resources.engine_manager.processes
    workers = workers_of(engine.pid)
    assert not list(Path("/dev/shm").glob("vllm_dist_*-cpushm_*")), "what they share would outlive them"
    os.kill(workers[1], signal.SIGKILL)
    with pytest.raises(ActorDiedError, match="the vLLM engine failed"):
        run(two.logprobs(TOKENS, OFFSETS, None, -1))
    until_gone(workers, "both workers to end")


@pytest.mark.soak
def test_engine_and_workers_end_with_a_parent_that_is_killed(reference: Reference, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), str(reference.folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "err").open("w"),
        text=True,
    )
    assert process.stdout is not None
    ready = next((line.split() for line in process.stdout if line.startswith("READY")), None)
    assert ready is not None, (tmp_path / "err").read_text()[-3000:]
    engine = int(ready[1])
    everyone = [engine, *workers_of(engine)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    until_gone(everyone, "engine and workers of a killed process to end")
