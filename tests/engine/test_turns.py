"""Completions of several turns on a real engine, with an environment in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from rlsys.config import TurnSection
from rlsys.environments.environment_pool import Environment
from rlsys.environments.multi_turn import Conversations, TurnRules
from rlsys.rollouts import ENVIRONMENT, STOP, Rollouts
from rlsys.sampler.engine import Sampler
from rlsys.types import SamplingParams
from tests.engine.test_moving import met, under_way
from tests.engine.test_sampler import prompts
from tests.engine.tiny_engine import BOUND, EOS, Reference

Run = Callable[..., Any]
PARAMS = SamplingParams(max_tokens=60, seed=3)


def counting(turns: Sequence[str], answer: str) -> str | None:
    """The numbers of the turns so far, as words of the tiny vocabulary, three times."""
    return f"w{100 + len(turns)} w{100 + len(answer)}" if len(turns) < 4 else None


@pytest.fixture(scope="module")
def environment() -> Iterator[Environment]:
    made = Environment(TurnSection(), counting)
    yield made
    made.close()


@pytest.fixture
def conversations(sampler: Sampler, environment: Environment) -> Conversations:
    tokenizer = sampler.engine.llm.get_tokenizer()
    rules = TurnRules(
        # a tenth of the words end a turn, beside the model's own end
        stop=[f"w{word}" for word in range(20, 34)],
        max_turns=8,
        max_failed_share=0.0,
        decode=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
        reply_ids=lambda reply, last: [int(word[1:]) for word in reply.split()],
    )
    return Conversations(sampler, environment, rules)


def test_each_turn_is_drawn_given_all_before_it_and_every_token_says_who_wrote_it(
    sampler: Sampler, conversations: Conversations, reference: Reference, run: Run
) -> None:
    adapter = reference.adapter(4, 1)
    run(sampler.load(reference.update("a", 3, adapter), BOUND))
    batch = prompts(20, 9)
    call = conversations.sample(**batch, answers=["", "yes"], n=3, params=PARAMS, run_id="a", version=3)
    rollouts, counts = run(call)
    assert isinstance(rollouts, Rollouts) and list(rollouts.group) == [0] * 3 + [1] * 3
    replies = 0
    for r, p in enumerate(rollouts.group):
        rows = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
        tokens, found, written = rollouts.tokens[rows], rollouts.logprobs[rows], rollouts.sampled[rows]
        whole = np.concatenate([rollouts.prompt(p), tokens])
        scores = reference.logprobs(whole, adapter)[len(rollouts.prompt(p)) - 1 :]
        np.testing.assert_allclose(found[written], scores[written], atol=BOUND)
        assert not found[~written].any()
        assert set(rollouts.versions[rows].tolist()) <= {3, ENVIRONMENT}
        words = tokens[~written].tolist()
        assert words == [word for turn in range(len(words) // 2) for word in (101 + turn, 100 + 3 * p)]
        replies += len(words) // 2
        ends = (tokens == EOS) | ((tokens >= 20) & (tokens < 34))
        assert ends[:-1][np.diff(written.astype(int)) == -1].all(), "a reply comes only after the end of a turn"
        assert len(tokens) <= PARAMS.max_tokens
    assert replies > 6
    assert counts["turns"] >= replies and counts["reply_errors"] == counts["reply_timeouts"] == 0
    assert sampler.stats().running_requests == 0
    assert sampler.engine.llm.get_num_unfinished_requests() == 0


def test_a_seed_repeats_a_conversation_whatever_else_is_sampled(
    sampler: Sampler, conversations: Conversations, reference: Reference, run: Run
) -> None:
    run(sampler.load(reference.update("a", 0, reference.adapter(4, 1)), BOUND))
    call: dict[str, Any] = {"answers": [""], "n": 3, "params": PARAMS, "run_id": "a", "version": 0}

    async def in_company() -> Rollouts:
        other = asyncio.create_task(sampler.sample(**prompts(30, 40), n=8, params=PARAMS, run_id="a", version=0))
        rollouts, _ = await conversations.sample(**prompts(20), **call)
        await other
        return rollouts

    alone, company = run(conversations.sample(**prompts(20), **call))[0], run(in_company())
    np.testing.assert_array_equal(alone.tokens, company.tokens)
    np.testing.assert_array_equal(alone.versions, company.versions)


def test_the_version_of_a_conversation_stays_until_it_is_over(
    sampler: Sampler, conversations: Conversations, reference: Reference, run: Run
) -> None:
    adapters = [reference.adapter(4, seed) for seed in range(5)]

    async def attempt() -> set[int] | None:
        await sampler.load(reference.update("a", 0, adapters[0]), BOUND)
        talk = asyncio.create_task(
            conversations.sample(**prompts(20), answers=[""], n=8, params=PARAMS, run_id="a", version=0)
        )
        await under_way(sampler, 5, talk)
        for version in range(1, 5):  # one more than there is room for, had the first to go
            await sampler.load(reference.update("a", version, adapters[version]), BOUND)
        if talk.done():
            return None
        assert ("a", 0) in sampler.stats().live
        rollouts, _ = await talk
        await sampler.load(reference.update("a", 5, adapters[0]), BOUND)
        assert ("a", 0) not in sampler.stats().live
        return set(rollouts.versions.tolist())

    assert run(met(attempt, sampler)) == {0, ENVIRONMENT}


def test_a_conversation_may_move_to_newer_versions_within_turns_and_between_them(
    sampler: Sampler, conversations: Conversations, reference: Reference, run: Run
) -> None:
    adapters = [reference.adapter(4, seed) for seed in range(2)]

    async def attempt() -> Rollouts | None:
        await sampler.load(reference.update("a", 0, adapters[0]), BOUND)
        talk = asyncio.create_task(
            conversations.sample(**prompts(20), answers=[""], n=12, params=PARAMS, run_id="a", version=0, move_on=True)
        )
        await under_way(sampler, 150, talk)
        await sampler.load(reference.update("a", 1, adapters[1]), BOUND)
        rollouts, _ = await talk
        return rollouts if mixed(rollouts) >= 2 else None

    def mixed(rollouts: Rollouts) -> int:
        rows = [slice(rollouts.offsets[r], rollouts.offsets[r + 1]) for r in range(6)]
        return sum({0, 1} <= set(rollouts.versions[each].tolist()) for each in rows)

    rollouts = run(met(attempt, sampler))
    for r in range(6):
        rows = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
        versions, written = rollouts.versions[rows], rollouts.sampled[rows]
        whole = np.concatenate([rollouts.prompt(0), rollouts.tokens[rows]])
        for version, adapter in enumerate(adapters):
            scores = reference.logprobs(whole, adapter)[len(rollouts.prompt(0)) - 1 :]
            own = written & (versions == version)
            np.testing.assert_allclose(rollouts.logprobs[rows][own], scores[own], atol=BOUND)
    assert (rollouts.stop_reasons == STOP).any()
