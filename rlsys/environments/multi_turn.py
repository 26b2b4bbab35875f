"""Completions of several turns: the model writes, the environment answers, until one of them has had enough.

    prompt | turn  reply  turn      ->   tokens    t t t r r t t
                                         versions  v v v E E v v      E: ENVIRONMENT, with log-probability 0

Token in, token out: what the model wrote is never made into tokens again. Each completion goes its own way; none waits
for the turns of another.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlsys import tasks
from rlsys.config import JobConfig
from rlsys.environments.environment_pool import ERROR, OVER, TIMEOUT, Environment, Reply
from rlsys.errors import ConfigError, GradingError
from rlsys.rollouts import Rollouts
from rlsys.sampler.completion import Completion, environment_reply, join_completions, to_rollouts
from rlsys.sampler.requests import child_seeds, later_seed
from rlsys.tokenization.renderer import Renderer
from rlsys.tokenization.stop_conditions import load_tokenizer
from rlsys.types import Array, SamplingParams


class TurnSampler(Protocol):
    """What a conversation needs of a ``Sampler``."""

    @property
    def end_ids(self) -> Sequence[int]: ...

    def own_seed(self) -> int: ...

    def hold(
        self, run_id: str | None, version: int, requests: int, moves: bool = False
    ) -> AbstractContextManager[Any]: ...

    async def draw(
        self, hold: Any, prompt: list[int], params: SamplingParams, also_stop: Sequence[str] = ()
    ) -> Completion: ...


@dataclass(frozen=True, slots=True)
class TurnRules:
    """How long a conversation goes on, and how its texts and tokens become one another."""

    stop: Sequence[str]  # texts that end a turn, beside the model's own end
    max_turns: int  # of the model
    max_failed_share: float  # of a call's completions that a failed reply cuts short
    decode: Callable[[Sequence[int]], str]
    reply_ids: Callable[[str, int | None], Sequence[int]]  # of a reply, and the last token of the turn before it


class Conversations:
    def __init__(self, sampler: TurnSampler, environment: Environment, rules: TurnRules) -> None:
        self._sampler, self._environment, self._rules = sampler, environment, rules

    @classmethod
    def start(cls, config: JobConfig, base: Path, sampler: TurnSampler) -> Conversations | None:
        """Start the processes that reply; None where the task's environment never does.

        Raises:
            ConfigError: the task cannot be made or sent to them, or runs code and may not or cannot.
        """
        if not tasks.converses(config.task):
            return None
        task = tasks.build(config.task, config.run.seed)
        assert isinstance(task, tasks.ConversationTask)
        sandbox = getattr(task, "sandbox", None)
        if sandbox is not None and not config.turns.python_tool:
            raise ConfigError(
                f"turns.python_tool: found false; task {config.task.name!r} runs what the model writes, in a process "
                "without network and with limits (docs/tasks.md); set turns.python_tool: true to allow that"
            )
        if sandbox is not None:
            sandbox.check()
        tokenizer, ends = load_tokenizer(base), frozenset(sampler.end_ids)
        renderer = Renderer(tokenizer, config.prompt)
        rules = TurnRules(
            stop=tuple(getattr(task, "stop", ())),
            max_turns=config.turns.max_turns,
            max_failed_share=config.rewards.max_failed_share,
            decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
            reply_ids=lambda reply, last: renderer.reply_ids(reply, last, last in ends),
        )
        return cls(sampler, Environment(config.turns, task.reply), rules)

    def progress(self) -> int:
        """Replies that have come to an end."""
        return self._environment.progress()

    def close(self) -> None:
        """Kill the processes that reply."""
        self._environment.close()

    async def sample(
        self,
        problems: Array,
        prompt_tokens: Array,
        prompt_offsets: Array,
        answers: Sequence[str],
        n: int,
        params: SamplingParams,
        run_id: str | None,
        version: int,
        move_on: bool = False,
        occurrence: Array | None = None,
    ) -> tuple[Rollouts, dict[str, float]]:
        """As ``Sampler.sample``, and counts. `params.max_tokens` is for a whole completion, replies included.

        A seed is a function of `params.seed`, the problem and its occurrence, which of its completions, and the turn:
        what is lost is drawn again as it was, by whichever sampler.

        Raises:
            SamplingError: as ``Sampler.sample``.
            GradingError: replies that failed cut more completions short than `max_failed_share` allows.
        """
        children = n if params.temperature > 0 else 1
        seed = params.seed if params.seed is not None else self._sampler.own_seed()
        seeds = child_seeds(seed, problems, children, occurrence)
        prompts = [part.tolist() for part in np.split(prompt_tokens, prompt_offsets[1:-1])] if len(problems) else []
        counts = Counter(completions=len(seeds))
        with self._sampler.hold(run_id, version, len(prompts), move_on) as hold:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(
                            self._converse(hold, prompts[i // children], answers[i // children], params, seed, counts)
                        )
                        for i, seed in enumerate(seeds)
                    ]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        done = [task.result() for task in tasks for _ in range(n // children)]
        rollouts = to_rollouts(problems, prompt_tokens, prompt_offsets, done)
        names = ("turns", "replies", "reply_timeouts", "reply_errors", "out_of_turns")
        return rollouts, {name: float(counts[name] * (n // children)) for name in names}

    async def _converse(
        self, hold: Any, prompt: list[int], answer: str, params: SamplingParams, seed: int, counts: Counter[str]
    ) -> Completion:
        """One completion."""
        rules, parts, turns = self._rules, list[Completion](), list[str]()
        before, room = list(prompt), params.max_tokens
        while True:
            asked = replace(params, max_tokens=room, seed=later_seed(seed, 1, len(turns)) if turns else seed)
            turn = await self._sampler.draw(hold, before, asked, rules.stop)
            parts.append(turn)
            turns.append(rules.decode(turn.tokens.tolist()))
            counts["turns"] += 1
            room -= len(turn.tokens)
            if not turn.stopped:
                return join_completions(parts)
            reply = await self._environment.reply(turns, answer)
            self._count(reply, counts)
            if reply.outcome in (OVER, TIMEOUT, ERROR):
                return join_completions(parts)
            if len(turns) == rules.max_turns:
                counts["out_of_turns"] += 1
                return join_completions(parts)
            tokens = list(rules.reply_ids(reply.text, int(turn.tokens[-1]) if len(turn.tokens) else None))
            if len(tokens) >= room:
                return join_completions([*parts[:-1], turn.head(len(turn.tokens), stopped=False)])
            parts.append(environment_reply(tokens))
            before += [*turn.tokens.tolist(), *tokens]
            room -= len(tokens)

    def _count(self, reply: Reply, counts: Counter[str]) -> None:
        """
        Raises:
            GradingError: too many have failed; one of a call is let off.
        """
        counts["replies"] += 1
        if reply.outcome not in (TIMEOUT, ERROR):
            return
        counts["reply_timeouts" if reply.outcome == TIMEOUT else "reply_errors"] += 1
        failed = counts["reply_timeouts"] + counts["reply_errors"]
        if failed > max(1, self._rules.max_failed_share * counts["completions"]):
            raise GradingError(
                f"{failed} of {counts['completions']} completions were cut short by a reply that failed "
                f"({counts['reply_timeouts']} timeouts, {counts['reply_errors']} errors), above "
                f"rewards.max_failed_share = {self._rules.max_failed_share:g}: they would be trained on. The last: "
                f"{reply.why}"
            )
