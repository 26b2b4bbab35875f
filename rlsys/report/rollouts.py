"""Selects completions for the report (worst, best, samples), and colours tokens by advantage and by ratio p / q."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlsys.report.numbers import number
from rlsys.run_state.jsonl import UNKNOWN, RolloutRow

MAX_TRAIN_ROWS = 200  # newest training rollouts shown; rollouts.jsonl has all
MAX_COLOURED = 40_000  # coloured tokens on the page, newest rows first
MAX_TOKENS = 1200  # per completion; the middle of a longer one is left out
MAX_CHARACTERS = 6000  # the same for a completion without recorded tokens
EXTREME_STEPS = 10  # newest recorded steps from which the worst and the best are chosen
EXTREMES = 3  # number of worst and of best rollouts
RATIO_LEVELS = (1.01, 1.05, 1.2)  # factors above which a ratio's colour gets stronger
LEVELS = len(RATIO_LEVELS)


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    advantage: str  # CSS class: ap1 to ap3 (positive), am1 to am3 (negative), empty for 0
    ratio: str  # CSS class: qp1 to qp3, qm1 to qm3, empty near 1
    said: str  # text of the tooltip
    kind: str  # "reply" for a token of the environment, else ""
    begins: bool  # whether a reply begins here


@dataclass(frozen=True, slots=True)
class CompletionView:
    """A rollout as shown on the page: head and tail of the completion, and a note on the part left out between."""

    row: RolloutRow
    problem: str  # id; empty if not known
    head: str
    tail: str
    head_tokens: Sequence[Token]  # both empty if tokens were not recorded or are too many
    tail_tokens: Sequence[Token]
    left_out: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One held-out problem with its completions before and after training."""

    prompt: str
    answer: str
    before: CompletionView | None
    after: CompletionView | None


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rollouts of one training step."""

    step: int
    rows: Sequence[CompletionView]
    mean_reward: float


@dataclass(frozen=True, slots=True)
class Samples:
    """Rollouts during training."""

    worst: Sequence[CompletionView]
    best: Sequence[CompletionView]
    steps: Sequence[StepRows]  # newest first
    left_out: int  # number of older rows that are not shown
    uncoloured: int  # number of rows shown without colours, because of MAX_COLOURED
    coloured: bool  # whether any row is coloured
    largest: float  # |advantage| with the strongest colour


def pairs(rows: Sequence[RolloutRow]) -> list[Pair]:
    """Rollouts of the evaluations before and after training, matched by prompt and answer, in recorded order."""
    before = {(row.prompt, row.answer): row for row in rows if row.phase == "before"}
    after = {(row.prompt, row.answer): row for row in rows if row.phase == "after"}

    def side(row: RolloutRow | None) -> CompletionView | None:
        return None if row is None else plain(row)

    return [Pair(*key, side(before.get(key)), side(after.get(key))) for key in {**before, **after}]


def samples(rows: Sequence[RolloutRow]) -> Samples:
    """Select the training rollouts shown on the page."""
    train = [row for row in rows if row.phase == "train"]
    kept = train[-MAX_TRAIN_ROWS:]
    largest = max((abs(a) for row in kept for a in row.advantages if math.isfinite(a)), default=0.0)
    room, shown = MAX_COLOURED, {}
    for row in reversed(kept):
        cost = min(len(row.pieces), MAX_TOKENS)
        fits = 0 < cost <= room
        room -= cost if fits else 0
        shown[id(row)] = coloured(row, largest) if fits else plain(row)
    worst, best = extremes(kept)
    uncoloured = sum(bool(one.row.pieces) and not one.head_tokens for one in shown.values())
    return Samples(
        worst=[shown[id(row)] for row in worst],
        best=[shown[id(row)] for row in best],
        steps=[
            StepRows(step, [shown[id(row)] for row in some], sum(row.reward for row in some) / len(some))
            for step, some in sorted(_by_step(kept).items(), reverse=True)
        ],
        left_out=len(train) - len(kept),
        uncoloured=uncoloured,
        coloured=any(one.head_tokens for one in shown.values()),
        largest=largest,
    )


def extremes(rows: Sequence[RolloutRow]) -> tuple[list[RolloutRow], list[RolloutRow]]:
    """(worst, best) rows of the newest steps by reward, then advantage, then newest step. No row is in both."""
    newest = sorted({row.step for row in rows})[-EXTREME_STEPS:]
    recent = [row for row in rows if row.step in newest]
    each = min(EXTREMES, len(recent) // 2)
    best = sorted(recent, key=lambda row: (-row.reward, -(row.advantage or 0.0), -row.step))[:each]
    chosen = set(map(id, best))
    worst = sorted(
        (row for row in recent if id(row) not in chosen), key=lambda row: (row.reward, row.advantage or 0.0, -row.step)
    )
    return worst[:each], best


def verdicts(rewards: Sequence[float]) -> Callable[[float], str]:
    """Function from a reward to its colour class. Rewards in [0, 1]: 1 is good, 0 is bad; others by thirds of their
    range."""
    finite = [reward for reward in rewards if math.isfinite(reward)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    third = (high - low) / 3
    bad, good = (0.0, 1.0) if low >= 0 and high <= 1 else (low + third, high - third)
    return lambda reward: "good" if reward >= good else "bad" if reward <= bad else "part"


def plain(row: RolloutRow) -> CompletionView:
    """A view of a row without coloured tokens."""
    text, half = row.completion, MAX_CHARACTERS // 2
    if len(text) <= MAX_CHARACTERS:
        return CompletionView(row, _problem(row), text, "", (), (), "")
    left_out = f"{len(text) - 2 * half} characters left out; rollouts.jsonl has them"
    return CompletionView(row, _problem(row), text[:half], text[-half:], (), (), left_out)


def coloured(row: RolloutRow, largest: float) -> CompletionView:
    """A view of a row with coloured tokens; `largest`: |advantage| with the strongest colour."""
    tokens, half = list(_tokens(row, largest)), MAX_TOKENS // 2
    if len(tokens) <= MAX_TOKENS:
        return CompletionView(row, _problem(row), "", "", tokens, (), "")
    left_out = f"{len(tokens) - 2 * half} tokens left out; rollouts.jsonl has them"
    return CompletionView(row, _problem(row), "", "", tokens[:half], tokens[-half:], left_out)


def _tokens(row: RolloutRow, largest: float) -> Iterable[Token]:
    was_sampled = True
    for at, (text, advantage, ratio, sampled) in enumerate(
        zip(row.pieces, row.advantages, row.ratios, row.sampled, strict=True), start=1
    ):
        where = f"token {at} of {len(row.pieces)}"
        if sampled:
            said = [
                where,
                f"advantage {number(advantage)}",
                "not trained on" if ratio is None else f"p/q {number(ratio)}",
            ]
            yield Token(text, _advantage_class(advantage, largest), _ratio_class(ratio), ", ".join(said), "", False)
        else:
            yield Token(text, "", "", f"{where}, written by the environment", "reply", was_sampled)
        was_sampled = sampled


def _advantage_class(advantage: float, largest: float) -> str:
    if not advantage or not math.isfinite(advantage):
        return ""
    level = min(LEVELS, max(1, math.ceil(LEVELS * abs(advantage) / largest - 1e-9)))
    return f"a{'p' if advantage > 0 else 'm'}{level}"


def _ratio_class(ratio: float | None) -> str:
    if ratio is None or math.isnan(ratio):
        return ""
    away = max(ratio, 1 / ratio) if ratio > 0 else math.inf
    level = sum(away > factor for factor in RATIO_LEVELS)
    return f"q{'p' if ratio > 1 else 'm'}{level}" if level else ""


def _problem(row: RolloutRow) -> str:
    return "" if row.problem == UNKNOWN else str(row.problem)


def _by_step(rows: Sequence[RolloutRow]) -> dict[int, list[RolloutRow]]:
    found: dict[int, list[RolloutRow]] = {}
    for row in rows:
        found.setdefault(row.step, []).append(row)
    return found
