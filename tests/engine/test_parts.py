"""Completions in parts, on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlsys.answer_parts import AnswerParts, CompletionPart, PartsRequest, PromptScores
from rlsys.errors import SamplingError
from rlsys.sampler.engine import Sampler
from rlsys.types import Array, SamplingParams
from tests.engine.tiny_engine import BOUND, EOS, MAX_LENGTH, VOCAB, Reference, at_work
from tests.waiting import until_async

Run = Callable[..., Any]
PARAMS = SamplingParams(max_tokens=10, seed=3, stop=[])


def prompt(length: int = 12) -> Array:
    return np.random.default_rng(1).integers(2, VOCAB, length).astype(np.int32)


def request(n: int = 3, length: int = 12, **more: Any) -> PartsRequest:
    return PartsRequest(prompt(length), n, **{"params": PARAMS, **more})


Parts = dict[int, list[CompletionPart]]


async def gathered(sampler: Sampler, asked: PartsRequest) -> tuple[Parts, PromptScores | None]:
    """Parts by completion, and the prompt's scores."""
    found: Parts = {}
    answers: list[AnswerParts] = [answer async for answer in sampler.sample_in_parts(asked, None, -1)]
    for answer in answers:
        for part in answer.completions:
            found.setdefault(part.index, []).append(part)
    scores = [answer.prompt for answer in answers if answer.prompt is not None]
    assert len(scores) <= 1 and (not scores or answers[0].prompt is scores[0])
    return found, scores[0] if scores else None


def words(tokens: Any) -> list[str]:
    """Special tokens have no text."""
    return [f"w{token}" for token in tokens if token > EOS]


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_parts_end_to_end_are_the_completions_and_scores_of_one_answer(
    n: int, incremental: bool, sampler: Sampler, run: Run
) -> None:
    asked = request(n, topk=2, prompt_topk=2, incremental=incremental)
    parts, scores = run(gathered(sampler, asked))
    whole, whole_scores = run(sampler.sample_scored(asked.prompt, n, PARAMS, 2, None, -1))
    assert scores is not None and sorted(parts) == list(range(n))
    np.testing.assert_allclose(scores.logprobs, whole_scores.logprobs, atol=BOUND)
    np.testing.assert_array_equal(scores.topk_tokens, whole_scores.topk_tokens)
    for index, mine in parts.items():
        assert (len(mine) > 1) == incremental
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in mine]), whole.completion(index))
        where = slice(whole.offsets[index], whole.offsets[index + 1])
        np.testing.assert_allclose(np.concatenate([part.logprobs for part in mine]), whole.logprobs[where], atol=BOUND)
        assert [part.finish for part in mine] == [None] * (len(mine) - 1) + ["length"]
        text = "".join(part.text for part in mine).split()
        assert text == words(whole.completion(index))
        for part in mine:
            assert part.topk_tokens.shape == part.topk_logprobs.shape == (len(part.tokens), 2)
            best = part.topk_logprobs[:, 0]
            assert (best >= part.topk_logprobs[:, 1]).all() and (best >= part.logprobs - BOUND).all()


def test_greedy_completions_are_all_the_same(sampler: Sampler, run: Run) -> None:
    parts, _ = run(gathered(sampler, request(3, params=replace(PARAMS, temperature=0.0))))
    tokens = [np.concatenate([part.tokens for part in mine]).tolist() for mine in parts.values()]
    assert len(tokens) == 3 and tokens[0] == tokens[1] == tokens[2]


def test_a_prompt_alone_is_scored_up_to_the_end_of_the_context(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    parts, scores = run(gathered(sampler, request(0, MAX_LENGTH, prompt_topk=1)))
    assert not parts and scores is not None
    np.testing.assert_allclose(scores.logprobs[1:], reference.logprobs(prompt(MAX_LENGTH), None), atol=BOUND)
    with pytest.raises(SamplingError, match=f"model.max_length = {MAX_LENGTH}"):
        run(gathered(sampler, request(1, MAX_LENGTH)))


def test_further_stop_conditions_end_a_completion_and_its_text_ends_before_them(sampler: Sampler, run: Run) -> None:
    parts, _ = run(gathered(sampler, request(1)))
    tokens = np.concatenate([part.tokens for part in parts[0]]).tolist()
    for more in ({"also_stop_ids": (tokens[4],)}, {"also_stop": (f"w{tokens[3]} w{tokens[4]}",)}):
        stopped, _ = run(gathered(sampler, request(1, **more)))
        at = tokens.index(tokens[4]) if "also_stop_ids" in more else 4
        assert np.concatenate([part.tokens for part in stopped[0]]).tolist() == tokens[: at + 1]
        assert stopped[0][-1].finish == "stop"
        end = at if "also_stop_ids" in more else 3
        assert "".join(part.text for part in stopped[0]).split() == words(tokens[:end])


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_reader_that_leaves_aborts_its_request(how: str, sampler: Sampler, run: Run) -> None:
    async def leave() -> None:
        asked = request(2, params=replace(PARAMS, max_tokens=240))

        async def read(seen: int) -> None:
            async with aclosing(sampler.sample_in_parts(asked, None, -1)) as answers:
                async for _ in answers:
                    seen -= 1
                    if not seen:
                        return

        if how == "close":
            await read(3)
        else:
            reading = asyncio.create_task(read(10_000))
            await at_work(sampler, 2)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        assert sampler.stats().running_requests == 0
        left = sampler.engine.llm.output_processor
        await until_async(lambda: not left.has_unfinished_requests(), "an engine without requests", state=sampler.stats)

    run(leave())


def test_parts_of_a_version_that_is_not_there_start_nothing(sampler: Sampler, run: Run) -> None:
    async def ask() -> None:
        async for _ in sampler.sample_in_parts(request(1), "nobody", 0):
            pass

    with pytest.raises(SamplingError, match="nobody"):
        run(ask())


def test_completions_do_not_depend_on_others_in_the_batch(sampler: Sampler, run: Run) -> None:
    async def several() -> list[Any]:
        return await asyncio.gather(*(gathered(sampler, request(2)) for _ in range(4)))

    alone, _ = run(gathered(sampler, request(2)))
    for parts, _ in run(several()):
        for index, mine in parts.items():
            tokens = np.concatenate([part.tokens for part in mine])
            np.testing.assert_array_equal(tokens, np.concatenate([part.tokens for part in alone[index]]))
