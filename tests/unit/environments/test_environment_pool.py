"""Claims about processes that reply: whatever an environment does, there is an outcome, and the next call is served."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from rlsys.config import TurnSection
from rlsys.environments.environment_pool import ERROR, OVER, REPLIED, TIMEOUT, Environment, Reply
from rlsys.errors import ConfigError
from tests.unit.environments.sample_environments import Breaks, Unpicklable, answering
from tests.waiting import FAR_S, times

TIMEOUT_S = 2.0  # on a machine that does nothing else
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def environment() -> Iterator[Environment]:
    made = Environment(TurnSection(reply_timeout_s=TIMEOUT_S * times(), workers=2), answering)
    yield made
    made.close()


def ask(environment: Environment, *turns: str, answer: str = "") -> Reply:
    return asyncio.run(environment.reply(turns, answer))


def test_a_reply_sees_all_turns_and_the_answer_and_none_is_the_end(environment: Environment) -> None:
    assert ask(environment, "say hello") == Reply(REPLIED, "hello")
    assert ask(environment, "x", "y", "count") == Reply(REPLIED, "3")
    assert ask(environment, "answer", answer="42") == Reply(REPLIED, "42")
    assert ask(environment, "goodbye") == Reply(OVER)
    assert ask(environment, "say") == Reply(REPLIED, "")


@pytest.mark.parametrize(
    ("order", "outcome", "why"),
    [
        ("sleep", TIMEOUT, "no reply within turns.reply_timeout_s = "),
        ("raise", ERROR, "lost the dice"),
        ("leave", ERROR, "SystemExit"),
        ("number", ERROR, "replied 7 of type int; wanted a string or None"),
        ("flood", ERROR, "reply has 1000000 characters; wanted at most 100000"),
        ("hoard", ERROR, "MemoryError"),
        ("crash", ERROR, "the environment process died: signal 11"),
        ("die", ERROR, "the environment process died: signal 9"),
        ("exit", ERROR, "the environment process died: exit code 4"),
    ],
)
def test_a_fault_is_an_outcome_of_its_own_and_the_next_reply_comes(
    environment: Environment, order: str, outcome: int, why: str
) -> None:
    before = environment.progress()
    reply = ask(environment, order)
    assert (reply.outcome, reply.text) == (outcome, "")
    assert why in reply.why
    assert ask(environment, "say on") == Reply(REPLIED, "on")
    assert environment.progress() == before + 2


def test_half_a_surrogate_pair_becomes_text(environment: Environment) -> None:
    assert ask(environment, "surrogate") == Reply(REPLIED, "a?b")


def test_a_reply_that_hangs_does_not_hold_up_the_others() -> None:
    made = Environment(TurnSection(reply_timeout_s=FAR_S, workers=2), answering)

    async def both() -> None:
        slow = asyncio.create_task(made.reply(["sleep"], ""))
        await asyncio.sleep(0)
        for _ in range(5):
            assert (await made.reply(["say now"], "")).text == "now"
        assert not slow.done()
        slow.cancel()

    try:
        asyncio.run(both())
    finally:
        made.close()


def test_whoever_stops_waiting_stops_the_call(environment: Environment) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(environment.reply(["sleep"], ""), 0.2)
        assert (await environment.reply(["say on"], "")).text == "on"

    asyncio.run(give_up())


def test_no_process_outlives_its_environment() -> None:
    made = Environment(TurnSection(), answering)
    pid = int(ask(made, "pid").text)
    os.kill(pid, 0)
    made.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_cannot_be_sent_is_refused_and_what_does_not_arrive_says_so() -> None:
    with pytest.raises(ConfigError, match="cannot be sent to the environment processes"):
        Environment(TurnSection(), Unpicklable().reply)
    made = Environment(TurnSection(), Breaks().reply)
    reply = ask(made, "say hello")
    made.close()
    assert reply.outcome == ERROR
    assert "could not be loaded" in reply.why and "no dice here" in reply.why
