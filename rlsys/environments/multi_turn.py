"""Samples multi-turn completions: the model and the environment take turns until either ends the conversation.

    prompt | turn  reply  turn      ->   tokens    t t t r r t t
                                         versions  v v v E E v v      E: ENVIRONMENT, with log-probability 0

The token ids that the model sampled are kept: its turns are never re-tokenized. Conversations run concurrently, and
none waits for the turns of another.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from rlsys import tasks
from rlsys.config import JobConfig
from rlsys.environments.environment_pool import ERROR, OVER, TIMEOUT, Environment, Reply
from rlsys.errors import ConfigError, GradingError
from rlsys.rollouts import Rollouts
from rlsys.sampler.adapter_slots import AdapterLease
from rlsys.sampler.growing_completion import Completion, environment_reply, join_completions, to_rollouts
from rlsys.sampler.requests import child_seeds, later_seed
from rlsys.tokenization.renderer import Renderer
from rlsys.tokenization.stop_conditions import load_tokenizer
from rlsys.types import Array, SamplingParams


class TurnSampler(Protocol):
    """Methods of ``Sampler`` that a conversation uses."""

    @property
    def end_ids(self) -> Sequence[int]: ...

    def own_seed(self) -> int: ...

    def hold(
        self, run_id: str | None, version: int, requests: int, moves: bool = False
    ) -> AbstractContextManager[AdapterLease]: ...

    async def draw(
        self, hold: AdapterLease, prompt: list[int], params: SamplingParams, also_stop: Sequence[str] = ()
    ) -> Completion: ...


@dataclass(frozen=True, slots=True)
class TurnRules:
    """Limits of a conversation, and the conversions between its text and tokens."""

    stop: Sequence[str]  # texts that end a turn, in addition to the model's end tokens
    max_turns: int  # of the model
    max_failed_share: float  # share of a call's completions that failed replies may cut short
    decode: Callable[[Sequence[int]], str]
    reply_ids: Callable[[str, int | None], Sequence[int]]  # (reply, last token of the turn before it) -> token ids


class Conversations:
    """Sampler of multi-turn completions."""

    def __init__(self, sampler: TurnSampler, environment: Environment, rules: TurnRules) -> None:
        self._sampler, self._environment, self._rules = sampler, environment, rules

    @classmethod
    def start(cls, config: JobConfig, base: Path, sampler: TurnSampler) -> Conversations | None:
        """Build the environment; its processes start with `begin`. None if the task is single-turn.

        Raises:
            ConfigError: the task cannot be built or pickled, or it runs code and turns.python_tool is false or the
                sandbox does not work on this machine.
        """
        if not tasks.converses(config.task):
            return None
        task = tasks.build(config.task, config.run.seed)
        assert isinstance(task, tasks.ConversationTask)
        sandbox = getattr(task, "sandbox", None)
        if sandbox is not None and not config.turns.python_tool:
            raise ConfigError(
                f"turns.python_tool: found false; task {config.task.name!r} runs code that the model writes, in a "
                "sandboxed process without network access (docs/tasks.md); set turns.python_tool: true to allow this"
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

    def begin(self) -> None:
        """Start the environment processes."""
        self._environment.begin()

    def progress(self) -> int:
        """Return the number of finished environment calls."""
        return self._environment.progress()

    def close(self) -> None:
        """Kill the environment processes."""
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
        """Sample completions as ``Sampler.sample`` does; also return counts of turns and of outcomes of replies.

        `params.max_tokens` limits a completion with all its turns and replies. The seed of a turn is a function of
        `params.seed`, the problem, its occurrence, and the indices of completion and turn. A sampler that repeats a
        lost completion therefore uses the same seeds.

        Raises:
            SamplingError: as ``Sampler.sample``.
            GradingError: failed replies cut short a larger share of completions than `max_failed_share`.
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
        self,
        hold: AdapterLease,
        prompt: list[int],
        answer: str,
        params: SamplingParams,
        seed: int,
        counts: Counter[str],
    ) -> Completion:
        """Sample one completion, turn by turn."""
        rules, parts, turns = self._rules, list[Completion](), list[str]()
        before, room = list(prompt), params.max_tokens
        while True:
            turn_params = replace(params, max_tokens=room, seed=later_seed(seed, 1, len(turns)) if turns else seed)
            turn = await self._sampler.draw(hold, before, turn_params, rules.stop)
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
        """Count the outcome of a reply.

        Raises:
            GradingError: too many replies failed; a single failure per call is always allowed.
        """
        counts["replies"] += 1
        if reply.outcome not in (TIMEOUT, ERROR):
            return
        counts["reply_timeouts" if reply.outcome == TIMEOUT else "reply_errors"] += 1
        failed = counts["reply_timeouts"] + counts["reply_errors"]
        if failed > max(1, self._rules.max_failed_share * counts["completions"]):
            raise GradingError(
                f"{failed} of {counts['completions']} completions were cut short by a failed reply of the environment "
                f"({counts['reply_timeouts']} timeouts, {counts['reply_errors']} errors), above "
                f"rewards.max_failed_share = {self._rules.max_failed_share:g}; the model would be trained on these "
                f"incomplete completions. Last failure: {reply.why}"
            )
