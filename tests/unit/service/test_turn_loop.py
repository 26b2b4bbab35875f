"""Requests of many models on one learner, turn by turn."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys import losses
from rlsys.client.config import HostSpec
from rlsys.client.requests import Drop, Forward, ForwardBackward, OptimStep, Request, Skip
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.errors import ConfigError, GradientError
from rlsys.service.host_requests import CreateRun
from rlsys.service.host_turns import HostTurns, ThreadRank, Turn
from rlsys.service.learner_host import TrainingHost
from rlsys.service.turn_loop import TurnLoop
from rlsys.types import AdamParams
from tests.unit.tiny_learner import Models, assert_same_bits, draw, gradients, state

BUDGET = 24
CE = losses.resolve("cross_entropy")


class Recorded(ThreadRank):
    """A rank that notes whose turn it was."""

    def __init__(self, thread: ThreadPoolExecutor, host: TrainingHost) -> None:
        super().__init__(thread, HostTurns(host))
        self.host = host
        self.turns: list[str] = []

    async def turn(self, number: int, model_id: str, request: Request[Any] | None) -> Turn:
        self.turns.append(model_id)
        return await super().turn(number, model_id, request)


@pytest.fixture
def rank(tiny_model: Models, tmp_path: Path) -> Any:
    base = tiny_model(True)
    spec = HostSpec(
        base_model="tiny",
        model=ModelSection(path=str(base), max_length=64),
        learner=LearnerSection(token_budget=BUDGET),
        max_lora_rank=16,
        lora_alpha=8.0,
        serves_unembed=True,
        checkpoints=str(tmp_path),
        detached=None,
    )
    with ThreadPoolExecutor(1) as thread:
        yield Recorded(thread, TrainingHost(base, spec))


async def created(loop: TurnLoop, **tenants: str) -> None:
    """A run of each name for its tenant."""
    for seed, (model_id, tenant) in enumerate(tenants.items()):
        await loop.do(tenant, model_id, CreateRun(LoraSection(rank=4), seed))


def test_a_small_request_of_another_tenant_comes_after_one_micro_batch_of_a_big_one(rank: Recorded) -> None:
    async def main() -> None:
        loop = TurnLoop(rank, BUDGET)
        await created(loop, big="a", small="b", also="a")
        rank.turns.clear()
        big = asyncio.create_task(loop.do("a", "big", ForwardBackward(draw(datums=40), CE)))
        while rank.turns.count("big") < 3:
            await asyncio.sleep(0)
        also = asyncio.create_task(loop.do("a", "also", Skip()))
        for _ in range(4):
            before = len(rank.turns)
            await loop.do("b", "small", Forward(draw(datums=1), CE))
            waited = rank.turns[before:]
            assert "small" in waited[:2] and not big.done(), waited
        await asyncio.gather(big, also)
        assert rank.turns.index("also") < len(rank.turns) - 5, "the tenant's other model had to wait for the big pass"

    asyncio.run(main())


def test_what_a_model_computes_beside_others_has_the_bits_of_what_it_computes_alone(rank: Recorded) -> None:
    async def train(loop: TurnLoop, tenant: str, model_id: str, seed: int) -> list[Any]:
        await loop.do(tenant, model_id, CreateRun(LoraSection(rank=4), seed))
        answers: list[Any] = []
        for step in range(3):
            parts = [ForwardBackward(draw(datums=6 + seed, seed=10 * seed + step + i), CE) for i in range(2)]
            passes = [asyncio.create_task(loop.do(tenant, model_id, part)) for part in parts]
            await asyncio.sleep(0)
            answers += [(await each).logprobs.tobytes() for each in passes]
            answers.append(await loop.do(tenant, model_id, OptimStep(AdamParams(1e-2))))
        return answers

    async def main() -> None:
        loop = TurnLoop(rank, BUDGET)
        among = await asyncio.gather(*(train(loop, f"t{seed % 2}", f"m{seed}", seed) for seed in range(4)))
        interleaved = sum(a != b for a, b in zip(rank.turns, rank.turns[1:], strict=False))
        assert interleaved > len(rank.turns) / 2
        for seed in range(4):
            assert await train(loop, "one", f"alone{seed}", seed) == among[seed]
            learner = rank.host.learner
            assert_same_bits(state(learner, f"alone{seed}"), state(learner, f"m{seed}"))

    asyncio.run(main())


def test_a_run_that_is_dropped_halfway_fails_its_calls_and_leaves_the_others(rank: Recorded) -> None:
    async def main() -> None:
        loop = TurnLoop(rank, BUDGET)
        await created(loop, lost="a", kept="b")
        half = asyncio.create_task(loop.do("a", "lost", ForwardBackward(draw(datums=40), CE)))
        step = asyncio.create_task(loop.do("a", "lost", OptimStep(AdamParams())))
        kept = asyncio.create_task(loop.do("b", "kept", ForwardBackward(draw(datums=20), CE)))
        while rank.turns.count("lost") < 4:
            await asyncio.sleep(0)
        await loop.drop("a", "lost", "its client is gone")
        for call in (half, step):
            with pytest.raises(ConfigError, match="training client lost: its client is gone"):
                await call
        await kept
        assert rank.host.learner.runs.ids == ["kept"] and rank.turns.count("lost") < 10
        await created(loop, alone="b")

    asyncio.run(main())
    host, learner = rank.host, rank.host.learner
    learner.runs.drop("alone")
    host.create("alone", LoraSection(rank=4), 1)
    host.do("alone", ForwardBackward(draw(datums=20), CE))
    assert_same_bits(gradients(learner, "kept"), gradients(learner, "alone"))


def test_a_cancelled_call_that_has_begun_is_finished_and_one_that_waits_never_runs(rank: Recorded) -> None:
    async def main() -> None:
        loop = TurnLoop(rank, BUDGET)
        await created(loop, m="a")
        begun = asyncio.create_task(loop.do("a", "m", ForwardBackward(draw(datums=20), CE)))
        waits = asyncio.create_task(loop.do("a", "m", OptimStep(AdamParams())))
        while rank.turns.count("m") < 3:
            await asyncio.sleep(0)
        for call in (waits, begun):
            call.cancel()
        await loop.do("a", "m", Skip())
        assert rank.host.learner.runs.version("m") == 0 and rank.host.learner.runs.has_gradient("m")

    asyncio.run(main())


def test_a_request_that_fails_is_charged_and_lets_the_next_one_in(rank: Recorded) -> None:
    async def main() -> None:
        loop = TurnLoop(rank, BUDGET)
        await created(loop, m="a")
        with pytest.raises(GradientError, match="no forward_backward"):
            await loop.do("a", "m", OptimStep(AdamParams()))
        result = await loop.do("a", "m", Forward(draw(), CE))
        assert np.isfinite(result.loss_sum)
        await loop.do("a", "m", Drop())
        assert rank.host.learner.runs.ids == []

    asyncio.run(main())


def test_a_learner_that_broke_fails_all_work_now_and_later(rank: Recorded) -> None:
    async def main() -> None:
        loop = TurnLoop(rank, BUDGET)
        await created(loop, m="a", n="b")
        calls = [asyncio.create_task(loop.do(t, m, ForwardBackward(draw(datums=40), CE))) for t, m in ("am", "bn")]
        while len(rank.turns) < 6:
            await asyncio.sleep(0)
        loop.fail(ConfigError("broken"))
        for call in (*calls, loop.do("a", "m", Skip())):
            with pytest.raises(ConfigError, match="broken"):
                await call

    asyncio.run(main())
