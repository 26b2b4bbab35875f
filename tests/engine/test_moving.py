"""Requests that go on under each newer version: every token is of the version that it says, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from rlsys.errors import SamplingError
from rlsys.rollouts import LENGTH, STOP, Rollouts
from rlsys.sampler.engine import Sampler
from rlsys.sampler.stop_strings import stop_across
from rlsys.types import SamplingParams
from tests.engine.test_sampler import prompts
from tests.engine.tiny_engine import BOUND, EOS, Reference
from tests.waiting import Sign, until_async

T = TypeVar("T")
Run = Callable[..., Any]
ATTEMPTS = 50
LONG = SamplingParams(max_tokens=200, seed=3, stop=[])


@pytest.fixture(scope="module")
def adapters(reference: Reference) -> list[dict[str, torch.Tensor]]:
    return [reference.adapter(4, seed) for seed in range(3)]


async def under_way(sampler: Sampler, tokens: int, task: asyncio.Task[Any]) -> None:
    """Until the engine has made about so many steps more, or all of the task's."""
    end, advanced = sampler.engine.heartbeat.advanced + tokens, Sign("steps", lambda: sampler.engine.heartbeat.advanced)
    await until_async(
        lambda: task.done() or sampler.engine.heartbeat.advanced >= end, f"step {end} of the engine", advanced
    )


async def met(attempt: Callable[[], Awaitable[T | None]], sampler: Sampler) -> T:
    """What an attempt finds. On a loaded machine the engine may be done before this process gets to its next line."""
    for _ in range(ATTEMPTS):
        if (found := await attempt()) is not None:
            return found
        await sampler.roll_back("a")
    raise AssertionError(f"in none of {ATTEMPTS} attempts was the engine at work when it mattered")


async def sample_while_loading(
    sampler: Sampler, reference: Reference, adapters: list[dict[str, torch.Tensor]], params: SamplingParams, n: int = 3
) -> Rollouts:
    """Two prompts, and a newer version twice while they are sampled."""

    async def attempt() -> Rollouts | None:
        await sampler.load(reference.update("a", 0, adapters[0]), BOUND)
        batch = prompts(20, 9)
        task = asyncio.create_task(sampler.sample(**batch, n=n, params=params, run_id="a", version=0, move_on=True))
        for version in (1, 2):
            await under_way(sampler, 4 * n, task)  # two tokens of each: loading takes some thirty more
            await sampler.load(reference.update("a", version, adapters[version], adapters[version - 1]), BOUND)
        rollouts = await task
        return rollouts if set(rollouts.versions.tolist()) == {0, 1, 2} else None

    return await met(attempt, sampler)


@dataclass(frozen=True, slots=True)
class Moved:
    """Requests that moved on twice, and the engine right after them."""

    rollouts: Rollouts
    unfinished: int
    running: int
    live: tuple[tuple[str, int], ...]  # once two further versions were loaded


@pytest.fixture(scope="module")
def moved(engine: Sampler, reference: Reference, run: Run, adapters: list[dict[str, torch.Tensor]]) -> Moved:
    async def move() -> Moved:
        rollouts = await sample_while_loading(engine, reference, adapters, LONG)
        unfinished, running = engine.engine.llm.get_num_unfinished_requests(), engine.stats().running_requests
        for key in (("a", 3), ("a", 4)):
            await engine.load(reference.update(*key, adapters[0]), BOUND)
        live = engine.stats().live
        for key in live:
            await engine.unload(*key)
        return Moved(rollouts, unfinished, running, live)

    made: Moved = run(move())
    return made


def test_versions_change_inside_a_completion_and_each_token_scores_as_under_its_own(
    moved: Moved, reference: Reference, adapters: list[dict[str, torch.Tensor]]
) -> None:
    rollouts = moved.rollouts
    assert (rollouts.lengths == 200).all() and (rollouts.stop_reasons == LENGTH).all()
    assert list(rollouts.group) == [0, 0, 0, 1, 1, 1]
    foreign, seen = [], []
    for r, p in enumerate(rollouts.group):
        rows = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
        versions, found, prompt = rollouts.versions[rows], rollouts.logprobs[rows], rollouts.prompt(p)
        assert (np.diff(versions) >= 0).all()
        seen.append(set(versions.tolist()))
        whole = np.concatenate([prompt, rollouts.completion(r)])
        scores = [reference.logprobs(whole, adapter)[len(prompt) - 1 :] for adapter in adapters]
        for version in range(3):
            np.testing.assert_allclose(found[versions == version], scores[version][versions == version], atol=BOUND)
            if (versions != version).any():
                foreign.append(np.abs(found - scores[version])[versions != version].mean())
    assert {0, 1, 2} in seen
    assert min(foreign) > 100 * BOUND, "the versions are too alike for this test to tell them apart"


def test_nothing_is_left_running_and_the_versions_left_behind_make_room(moved: Moved) -> None:
    assert (moved.unfinished, moved.running) == (0, 0)
    assert moved.live == (("a", 1), ("a", 2), ("a", 3), ("a", 4))


def test_without_a_newer_version_the_same_is_drawn_as_by_group_requests(
    sampler: Sampler, reference: Reference, run: Run, adapters: list[dict[str, torch.Tensor]]
) -> None:
    run(sampler.load(reference.update("a", 0, adapters[0]), BOUND))
    call: dict[str, Any] = {**prompts(20, 9), "n": 3, "run_id": "a", "version": 0}
    for params in (LONG, replace(LONG, temperature=0.0)):
        stays, moves = (run(sampler.sample(**call, params=params, move_on=on)) for on in (False, True))
        np.testing.assert_array_equal(stays.tokens, moves.tokens)
        np.testing.assert_array_equal(stays.group, moves.group)
        np.testing.assert_allclose(stays.logprobs, moves.logprobs, atol=BOUND)


def test_a_call_that_moves_begins_with_the_newest_version(
    sampler: Sampler, reference: Reference, run: Run, adapters: list[dict[str, torch.Tensor]]
) -> None:
    for version in (0, 1):
        run(sampler.load(reference.update("a", version, adapters[version]), BOUND))
    batch = prompts(20)
    rollouts = run(sampler.sample(**batch, n=2, params=LONG, run_id="a", version=0, move_on=True))
    assert set(rollouts.versions.tolist()) == {1}
    with pytest.raises(SamplingError, match="run 'a' version 2 is not loaded"):
        run(sampler.sample(**batch, n=2, params=LONG, run_id="a", version=2, move_on=True))


def test_completions_that_have_ended_are_left_alone_while_others_of_their_group_go_on(
    sampler: Sampler, reference: Reference, run: Run, adapters: list[dict[str, torch.Tensor]]
) -> None:
    rollouts = run(sample_while_loading(sampler, reference, adapters, replace(LONG, stop=None), n=24))
    ended = rollouts.stop_reasons == STOP
    assert ended.any() and not ended.all()
    for r in range(48):
        completion = rollouts.completion(r)
        assert EOS not in completion[:-1]
        assert (completion[-1] == EOS) == bool(ended[r])
    last = rollouts.versions[rollouts.offsets[1:] - 1]
    assert len(set(last[ended].tolist())) > 1, "all ended under one version: nothing was told apart"


def test_a_run_that_goes_back_ends_what_would_have_moved(
    sampler: Sampler, reference: Reference, run: Run, adapters: list[dict[str, torch.Tensor]]
) -> None:
    async def attempt() -> bool | None:
        await sampler.load(reference.update("a", 5, adapters[0]), BOUND)
        with sampler.hold("a", 5, 1, moves=True) as hold:
            task = asyncio.create_task(sampler.draw(hold, [3, 4, 5], LONG))
            await under_way(sampler, 5, task)
            await sampler.roll_back("a")
            await sampler.load(reference.update("a", 5, adapters[1]), BOUND)  # the same number, other weights
            await asyncio.wait([task])
            with pytest.raises(SamplingError, match="went back to an earlier step"):
                await sampler.draw(hold, [3, 4, 5], LONG)
        assert sampler.engine.llm.get_num_unfinished_requests() == 0
        if task.exception() is None:
            return None
        with pytest.raises(SamplingError, match="went back to an earlier step"):
            await task
        return True

    assert run(met(attempt, sampler))


def test_a_stop_string_across_the_seam_ends_the_completion(
    sampler: Sampler, reference: Reference, run: Run, adapters: list[dict[str, torch.Tensor]]
) -> None:
    """Greedy, and both versions have the same weights, so that only the seam differs; it lies within the string."""
    greedy = replace(LONG, temperature=0.0)

    async def attempt() -> set[int] | None:
        await sampler.load(reference.update("a", 0, adapters[0]), BOUND)
        free = await sampler.sample(**prompts(20), n=1, params=greedy, run_id="a", version=0)
        words = [f"w{token}" for token in free.tokens]
        stop = " ".join(words[10:150])
        wanted = next(count for count in range(200) if stop in " ".join(words[:count]))
        ends = replace(greedy, stop=[stop])
        task = asyncio.create_task(sampler.sample(**prompts(20), n=1, params=ends, run_id="a", version=0, move_on=True))
        await under_way(sampler, 12, task)
        await sampler.load(reference.update("a", 1, adapters[0], adapters[0]), BOUND)
        cut = await task
        np.testing.assert_array_equal(cut.tokens, free.tokens[:wanted])
        assert cut.stop_reasons[0] == STOP
        within = set(cut.versions[10:wanted].tolist())
        return within if within == {0, 1} else None

    assert run(met(attempt, sampler)) == {0, 1}


def test_a_stop_string_is_seen_from_both_sides_of_the_seam_and_from_no_other() -> None:
    texts = {1: "a", 2: ">", 3: ">>", 4: "b>", 5: "", 6: ">>="}

    def decode(tokens: list[int]) -> str:
        return "".join(texts[token] for token in tokens)

    assert stop_across(decode, [1, 2], [2, 1], [">>"]) == 1
    assert stop_across(decode, [1, 2], [5, 6, 1], [">>"]) == 2  # a token without text in between
    assert stop_across(decode, [1, 1], [3, 1], [">>"]) is None  # all of it after the seam: the engine's own business
    assert stop_across(decode, [1, 2], [1, 3], [">>"]) is None
    assert stop_across(decode, [1, 4, 1], [2], [">>"]) is None
    assert stop_across(decode, [2, 2], [2, 2, 1], ["<<", ">>>>"]) == 2
    assert stop_across(decode, [2], [], [">>"]) is None
