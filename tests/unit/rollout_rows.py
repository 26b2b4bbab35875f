"""Rows of rollouts.jsonl for tests."""

from __future__ import annotations

from typing import Any, Literal

from rlsys.run_state.jsonl import RolloutRow


def rollout(
    step: int,
    phase: Literal["before", "train", "after"],
    prompt: str,
    completion: str,
    answer: str,
    reward: float,
    advantage: float | None,
    tokens: int,
    stop_reason: str,
    **of_tokens: Any,
) -> RolloutRow:
    """Without tokens, unless given."""
    more = {"problem": 7, "pieces": [], "advantages": [], "ratios": [], "sampled": [], **of_tokens}
    return RolloutRow(step, phase, prompt, completion, answer, reward, advantage, tokens, stop_reason, **more)


def in_tokens(
    pieces: list[str], advantage: float, ratios: list[float | None], step: int = 1, reply: tuple[int, ...] = ()
) -> RolloutRow:
    """A completion with one advantage; tokens whose places are in `reply` were written by the environment."""
    sampled = [at not in reply for at in range(len(pieces))]
    return rollout(
        step,
        "train",
        "2 + 2 =",
        "".join(pieces),
        "4",
        float(advantage > 0),
        advantage,
        len(pieces),
        "stop",
        pieces=pieces,
        advantages=[advantage if written else 0.0 for written in sampled],
        ratios=[ratio if written else None for ratio, written in zip(ratios, sampled, strict=True)],
        sampled=sampled,
    )
