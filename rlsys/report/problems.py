"""Which training problems the policy never solves, and which it always does: those that teach nothing any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.run_state.jsonl import GroupsRow, ProblemRow

MAX_LISTED = 15  # of each kind, the most often tried first
MAX_PROMPT = 600  # characters


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one problem in the groups that it was drawn for."""

    id: int
    groups: int
    solved: float  # share of their completions that are right, 0 to 1
    last_step: int
    prompt: str  # empty where problems.jsonl does not have it
    answer: str


@dataclass(frozen=True, slots=True)
class Outcomes:
    never: Sequence[Tried]
    always: Sequence[Tried]
    sometimes: Sequence[Tried]
    groups: int
    total: int | None  # problems there are; None: not written down

    @property
    def tried(self) -> int:
        return len(self.never) + len(self.always) + len(self.sometimes)

    def listed(self, kind: str) -> Sequence[Tried]:
        """Those that people want to look at first."""
        return sorted(getattr(self, kind), key=lambda one: (-one.groups, -one.last_step, one.id))[:MAX_LISTED]


def outcomes(rows: Sequence[GroupsRow], problems: Mapping[int, ProblemRow]) -> Outcomes | None:
    """None before the first group."""
    shares: dict[int, list[float]] = {}
    last: dict[int, int] = {}
    for row in rows:
        for problem, share in zip(row.problems, row.solved, strict=True):
            shares.setdefault(problem, []).append(share)
            last[problem] = max(row.step, last.get(problem, 0))
    if not shares:
        return None
    found: dict[str, list[Tried]] = {"never": [], "always": [], "sometimes": []}
    for problem, some in shares.items():
        kind = "never" if max(some) <= 0 else "always" if min(some) >= 1 else "sometimes"
        known = problems.get(problem)
        prompt, answer = (_short(known.prompt), known.answer) if known else ("", "")
        found[kind].append(Tried(problem, len(some), sum(some) / len(some), last[problem], prompt, answer))
    return Outcomes(**found, groups=sum(map(len, shares.values())), total=len(problems) or None)


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= MAX_PROMPT else prompt[:MAX_PROMPT] + " …"
