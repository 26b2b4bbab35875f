"""Sorts training problems into never, sometimes and always solved. Never and always solved ones give no gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.run_state.jsonl import GroupsRow, ProblemRow

MAX_LISTED = 15  # per kind, most sampled first
MAX_PROMPT = 600  # characters


@dataclass(frozen=True, slots=True)
class Tried:
    """Results of one problem in all groups that were sampled for it."""

    id: int
    groups: int
    solved: float  # share of correct completions, 0 to 1
    last_step: int
    prompt: str  # empty if problems.jsonl does not have it
    answer: str


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Problems by how often they were solved."""

    never: Sequence[Tried]
    always: Sequence[Tried]
    sometimes: Sequence[Tried]
    groups: int
    total: int | None  # training problems in total; None: not recorded

    @property
    def tried(self) -> int:
        return len(self.never) + len(self.always) + len(self.sometimes)

    def listed(self, kind: str) -> Sequence[Tried]:
        """At most MAX_LISTED problems of a kind, most sampled first."""
        return sorted(getattr(self, kind), key=lambda one: (-one.groups, -one.last_step, one.id))[:MAX_LISTED]


def outcomes(rows: Sequence[GroupsRow], problems: Mapping[int, ProblemRow]) -> Outcomes | None:
    """Outcomes of all problems in the recorded groups; None before the first group."""
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
