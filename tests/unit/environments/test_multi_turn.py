"""Claims about completions of several turns. The model is a script, the environment is real and in its own process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from rlsys.config import TurnSection
from rlsys.environments.environment_pool import Environment
from rlsys.environments.multi_turn import Conversations, TurnRules
from rlsys.errors import GradingError, SamplingError
from rlsys.rollouts import ENVIRONMENT, LENGTH, STOP, Rollouts, offsets_of
from rlsys.sampler.adapter_slots import AdapterLease
from rlsys.sampler.growing_completion import Completion, completion_of
from rlsys.types import SamplingParams
from tests.unit.environments.sample_environments import answering
from tests.waiting import times, until_async

END, OFFSET = 1, 1000  # a character is its code point + OFFSET
PARAMS = SamplingParams(max_tokens=60, seed=7)


def ids(text: str) -> list[int]:
    return [END if character == "$" else ord(character) + OFFSET for character in text]


def text(tokens: Sequence[int]) -> str:
    return "".join(chr(token - OFFSET) for token in tokens if token != END)


@dataclass(eq=False)
class Script:
    """Draws what `writes(prompt, seed)` says, with the log-probability -0.5, cut at the room there is."""

    writes: Callable[[str, int], str]
    end_ids: tuple[int, ...] = (END,)
    calls: list[tuple[str, int, int, tuple[str, ...]]] = field(default_factory=list)
    holds: list[tuple[Any, ...]] = field(default_factory=list)
    after: dict[str, int] = field(default_factory=dict)  # calls that are made before this one goes on

    def own_seed(self) -> int:
        return 99

    @contextmanager
    def hold(self, run_id: str | None, version: int, requests: int, moves: bool = False) -> Iterator[AdapterLease]:
        self.holds.append((run_id, version, requests, moves))
        try:
            yield AdapterLease(run_id, version, None, moves, rollbacks=0)
        finally:
            self.holds.append(())

    async def draw(
        self, hold: AdapterLease, prompt: list[int], params: SamplingParams, also_stop: Sequence[str] = ()
    ) -> Completion:
        assert params.seed is not None
        so_far = text(prompt)
        await until_async(lambda: len(self.calls) >= self.after.get(so_far, 0), "calls of others")
        self.calls.append((so_far, params.seed, params.max_tokens, tuple(also_stop)))
        whole = ids(self.writes(so_far, params.seed))
        tokens = whole[: params.max_tokens]
        return completion_of(tokens, [-0.5] * len(tokens), hold.version, stopped=len(whole) <= params.max_tokens)


@pytest.fixture(scope="module")
def environment() -> Iterator[Environment]:
    made = Environment(TurnSection(reply_timeout_s=2.0 * times(), workers=2), answering)
    yield made
    made.close()


def sample(
    script: Script,
    environment: Environment,
    prompts: Sequence[str],
    n: int = 1,
    params: SamplingParams = PARAMS,
    max_turns: int = 5,
    share: float = 1.0,
    names: Sequence[int] | None = None,
) -> tuple[Rollouts, dict[str, float]]:
    rules = TurnRules((";",), max_turns, share, text, lambda reply, last: ids("<" * (last != END) + reply))
    encoded = [ids(prompt) for prompt in prompts]
    return asyncio.run(
        Conversations(script, environment, rules).sample(
            np.arange(len(prompts)) if names is None else np.array(names),
            np.concatenate(encoded).astype(np.int32),
            offsets_of([len(one) for one in encoded]),
            [f"answer{i}" for i in range(len(prompts))],
            n,
            params,
            "run",
            3,
        )
    )


def test_turns_and_replies_lie_end_to_end_and_only_turns_count_as_sampled(environment: Environment) -> None:
    script = Script(lambda prompt, _: {"Q": "say hi;", "Qsay hi;<hi": "answer$"}.get(prompt, "bye$"))
    rollouts, counts = sample(script, environment, ["Q"])
    written = [("say hi;", 3), ("<hi", ENVIRONMENT), ("answer$", 3), ("answer0", ENVIRONMENT), ("bye$", 3)]
    assert rollouts.tokens.tolist() == ids("".join(part for part, _ in written))
    assert rollouts.versions.tolist() == [version for part, version in written for _ in part]
    np.testing.assert_array_equal(rollouts.logprobs, np.where(rollouts.versions == ENVIRONMENT, 0.0, -0.5))
    assert rollouts.sampled_lengths.tolist() == [len("say hi;answer$bye$")]
    assert rollouts.stop_reasons.tolist() == [STOP]
    assert counts == {"turns": 3, "replies": 3, "reply_timeouts": 0, "reply_errors": 0, "out_of_turns": 0}
    assert script.holds == [("run", 3, 1, False), ()]
    assert {stop for *_, stop in script.calls} == {(";",)}


def test_a_completion_is_put_where_it_belongs_however_many_turns_it_takes(environment: Environment) -> None:
    writes = {"A": "say one;", "Asay one;<one": "done;", "B": "bye;"}
    rollouts, _ = sample(Script(lambda prompt, _: writes[prompt]), environment, ["A", "B"], n=2)
    assert rollouts.group.tolist() == [0, 0, 1, 1]
    wanted = ["say one;<onedone;"] * 2 + ["bye;"] * 2
    assert [text(rollouts.completion(r).tolist()) for r in range(4)] == wanted
    assert [text(rollouts.prompt(p).tolist()) for p in range(2)] == ["A", "B"]


def test_the_room_is_shared_by_turns_and_replies(environment: Environment) -> None:
    """20 tokens: 'say hello' and ';', then '<hello', leave 4."""
    long = Script(lambda prompt, _: "say hello;" if prompt == "Q" else "and so on;")
    rollouts, counts = sample(long, environment, ["Q"], params=SamplingParams(max_tokens=20, seed=1))
    assert text(rollouts.completion(0).tolist()) == "say hello;<helloand "
    assert rollouts.stop_reasons.tolist() == [LENGTH]
    assert [room for _, _, room, _ in long.calls] == [20, 4]
    assert counts["turns"] == 2 and counts["replies"] == 1


@pytest.mark.parametrize("room", [10, 15, 16])
def test_a_reply_that_leaves_no_room_for_another_token_is_left_out(environment: Environment, room: int) -> None:
    script = Script(lambda prompt, _: "say hello;")
    rollouts, _ = sample(script, environment, ["Q"], params=SamplingParams(max_tokens=room, seed=1))
    assert text(rollouts.completion(0).tolist()) == "say hello;"
    assert rollouts.stop_reasons.tolist() == [LENGTH]


def test_a_last_turn_that_fills_the_room_and_is_done_is_no_truncation(environment: Environment) -> None:
    rollouts, _ = sample(Script(lambda *_: "bye;"), environment, ["Q"], params=SamplingParams(max_tokens=4, seed=1))
    assert rollouts.stop_reasons.tolist() == [STOP]


def test_turns_are_bounded_and_counted(environment: Environment) -> None:
    rollouts, counts = sample(Script(lambda *_: "count;"), environment, ["Q"], max_turns=3)
    assert text(rollouts.completion(0).tolist()) == "count;<1count;<2count;"
    assert counts["turns"] == 3 and counts["out_of_turns"] == 1
    _, ends = sample(Script(lambda *_: "bye;"), environment, ["Q"], max_turns=1)
    assert ends["out_of_turns"] == 0


def test_replies_that_fail_end_their_completion_and_are_counted(environment: Environment) -> None:
    writes = {"A": "sleep;", "B": "raise;", "C": "say hi;", "Csay hi;<hi": "die;", "D": "bye;"}
    rollouts, counts = sample(Script(lambda prompt, _: writes[prompt]), environment, [*"ABCD"])
    found = [text(rollouts.completion(r).tolist()) for r in range(4)]
    assert found == ["sleep;", "raise;", "say hi;<hidie;", "bye;"]
    assert counts == {"turns": 5, "replies": 5, "reply_timeouts": 1, "reply_errors": 2, "out_of_turns": 0}


def test_where_most_replies_fail_the_run_stops_with_the_cause(environment: Environment) -> None:
    with pytest.raises(
        GradingError, match=r"(?s)3 of 4 completions were cut short.*3 errors.*max_failed_share = 0\.5.*dice"
    ):
        sample(Script(lambda *_: "raise;"), environment, [*"ABCD"], share=0.5)
    _, counts = sample(Script(lambda p, _: "raise;" if p in "AB" else "bye;"), environment, [*"ABCD"], share=0.5)
    assert counts["reply_errors"] == 2


def test_no_completion_waits_for_the_turns_of_another(environment: Environment) -> None:
    script = Script(lambda prompt, _: "count;" if prompt.count("<") < 3 else "bye;", after={"A": 4})
    sample(script, environment, ["A", "B"])
    order = [prompt[0] for prompt, *_ in script.calls]
    assert order == [*"BBBBAAAA"]


def test_a_seed_is_a_function_of_problem_sample_and_turn_alone(environment: Environment) -> None:
    def seeds(prompts: Sequence[str], names: Sequence[int], **kwargs: Any) -> dict[tuple[str, int], list[int]]:
        script = Script(lambda prompt, _: "count;" if prompt.count("<") < 2 else "bye;")
        sample(script, environment, prompts, 2, names=names, **kwargs)
        found: dict[tuple[str, int], list[int]] = {}
        for prompt, seed, *_ in script.calls:
            found.setdefault((prompt[0], prompt.count("<")), []).append(seed)
        return {key: sorted(value) for key, value in found.items()}

    whole = seeds(["A", "B"], [10, 11])
    assert len({seed for both in whole.values() for seed in both}) == 2 * 2 * 3
    alone = seeds(["B"], [11])
    assert alone == {key: value for key, value in whole.items() if key[0] == "B"}
    twice = seeds(["A", "B"], [10, 10])
    assert len({seed for both in twice.values() for seed in both}) == 2 * 2 * 3, "a problem that comes twice"
    assert seeds(["A"], [10], params=SamplingParams(max_tokens=60, seed=8)) != seeds(["A"], [10])
    assert seeds(["A"], [10], params=SamplingParams(max_tokens=60)) == seeds(
        ["A"], [10], params=SamplingParams(max_tokens=60, seed=99)
    ), "without a seed the sampler's own"


def test_greedy_completions_are_made_once_and_count_n_times(environment: Environment) -> None:
    script = Script(lambda prompt, _: "count;" if "<" not in prompt else "bye;")
    greedy = SamplingParams(max_tokens=60, temperature=0.0, seed=1)
    rollouts, counts = sample(script, environment, ["A"], 3, params=greedy)
    assert len(script.calls) == 2
    assert [text(rollouts.completion(r).tolist()) for r in range(3)] == ["count;<1bye;"] * 3
    assert counts["turns"] == 6


def test_an_error_of_the_sampler_comes_out_as_itself_and_lets_go(environment: Environment) -> None:
    def writes(prompt: str, seed: int) -> str:
        raise SamplingError("went back")

    script = Script(writes)
    with pytest.raises(SamplingError, match="went back"):
        sample(script, environment, ["A", "B"])
    assert script.holds[-1] == ()
