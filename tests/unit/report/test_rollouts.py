"""Claims about which completions a report shows, and how their tokens are coloured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rlsys.report.problems import MAX_LISTED, outcomes
from rlsys.report.rollouts import EXTREME_STEPS, EXTREMES, MAX_CHARACTERS, MAX_COLOURED, MAX_TOKENS, extremes, samples
from rlsys.run_state.jsonl import UNKNOWN, GroupsRow, ProblemRow, RolloutRow
from tests.unit.rollout_rows import in_tokens, rollout


def graded(step: int, reward: float, advantage: float = 0.0) -> RolloutRow:
    return rollout(step, "train", "p", f"{step}/{reward}/{advantage}", "a", reward, advantage, 1, "stop")


def test_the_worst_and_the_best_are_the_ends_of_the_newest_steps_and_no_row_is_both() -> None:
    rows = [graded(step, reward) for step in range(40) for reward in (0.0, 1.0)]
    worst, best = extremes(rows)
    assert [(row.step, row.reward) for row in worst] == [(39, 0.0), (38, 0.0), (37, 0.0)]
    assert [(row.step, row.reward) for row in best] == [(39, 1.0), (38, 1.0), (37, 1.0)]
    assert extremes([graded(0, -5.0), *rows])[0] == worst, "an old step is not what a person asks about"
    for count in range(5):
        worst, best = extremes(rows[:count])
        assert len(worst) == len(best) == count // 2
        assert not set(map(id, worst)) & set(map(id, best))
    assert EXTREMES == 3 and EXTREME_STEPS == 10


def test_among_equal_rewards_the_stronger_lesson_comes_first() -> None:
    rows = [graded(1, 1.0, advantage) for advantage in (0.1, 0.9, 0.5)] + [graded(1, 0.0, -a) for a in (0.1, 0.9, 0.5)]
    worst, best = extremes(rows)
    assert [row.advantage for row in worst] == [-0.9, -0.5, -0.1]
    assert [row.advantage for row in best] == [0.9, 0.5, 0.1]


@pytest.mark.parametrize(
    ("ratio", "colour"),
    [
        (1.0, ""),
        (1.009, ""),
        (1.02, "qp1"),
        (1 / 1.02, "qm1"),
        (1.1, "qp2"),
        (1 / 1.1, "qm2"),
        (1.3, "qp3"),
        (0.7, "qm3"),
        (0.0, "qm3"),
        (math.inf, "qp3"),
        (math.nan, ""),
        (None, ""),
    ],
)
def test_a_ratio_is_coloured_by_the_factor_that_it_lies_away_from_one(ratio: float | None, colour: str) -> None:
    shown = samples([in_tokens(["a"], 0.5, [ratio])])
    assert shown.steps[0].rows[0].head_tokens[0].ratio == colour


def test_an_advantage_is_coloured_by_its_share_of_the_largest() -> None:
    rows = [in_tokens(["a"], advantage, [1.0], step=step) for step, advantage in enumerate([3.0, -2.0, 1.0, 0.01, 0.0])]
    shown = samples(rows)
    assert [step.rows[0].head_tokens[0].advantage for step in reversed(shown.steps)] == ["ap3", "am2", "ap1", "ap1", ""]
    assert shown.largest == 3.0


def test_a_reply_of_the_environment_has_no_colour_and_says_what_it_is() -> None:
    shown = samples([in_tokens(["a", "b", "c", "d", "e"], 0.5, [1.5] * 5, reply=(1, 2, 4))])
    tokens = shown.steps[0].rows[0].head_tokens
    assert [token.kind for token in tokens] == ["", "reply", "reply", "", "reply"]
    assert [token.begins for token in tokens] == [False, True, False, False, True]
    assert {(token.advantage, token.ratio) for token in tokens if token.kind} == {("", "")}


def test_a_long_completion_keeps_its_head_and_its_tail_and_says_what_is_missing() -> None:
    pieces = [f"<{at}>" for at in range(MAX_TOKENS + 11)]
    shown = samples([in_tokens(pieces, 0.5, [1.0] * len(pieces))]).steps[0].rows[0]
    assert [token.text for token in (*shown.head_tokens[:1], *shown.tail_tokens[-1:])] == [pieces[0], pieces[-1]]
    assert shown.left_out.startswith("11 tokens left out")
    text = "".join(pieces) * 3
    (row,) = samples([replace(graded(1, 1.0), completion=text)]).steps[0].rows
    assert text.startswith(row.head) and text.endswith(row.tail) and len(row.head + row.tail) == MAX_CHARACTERS
    assert row.left_out.startswith(f"{len(text) - MAX_CHARACTERS} characters")


def test_more_tokens_than_a_page_can_hold_are_shown_without_colours_the_oldest_first() -> None:
    size = 1000
    rows = [in_tokens(["a"] * size, 0.5, [1.0] * size, step=step) for step in range(MAX_COLOURED // size + 5)]
    shown = samples(rows)
    with_colours = [bool(step.rows[0].head_tokens) for step in shown.steps]  # newest first
    assert with_colours == [True] * (MAX_COLOURED // size) + [False] * 5
    assert shown.uncoloured == 5


def test_rows_without_tokens_or_without_a_known_problem_are_shown_plainly() -> None:
    shown = samples([replace(graded(1, 1.0), problem=UNKNOWN)])
    assert not shown.coloured and shown.steps[0].rows[0].problem == ""
    assert samples([]).steps == []


def test_a_problem_is_never_or_always_solved_only_if_all_of_its_groups_agree() -> None:
    rows = [GroupsRow(1, [0, 1, 2, 3], [0.0, 1.0, 0.0, 0.5]), GroupsRow(2, [0, 1, 2], [0.0, 1.0, 1.0])]
    found = outcomes(rows, {})
    assert found is not None
    assert [[one.id for one in some] for some in (found.never, found.always, found.sometimes)] == [[0], [1], [2, 3]]
    assert [one.solved for one in found.sometimes] == [0.5, 0.5]
    assert (found.tried, found.groups, found.total) == (4, 7, None)
    assert outcomes([], {}) is None


def test_the_most_often_tried_are_listed_first_and_not_all_of_many() -> None:
    rows = [GroupsRow(step, list(range(step, 50)), [0.0] * (50 - step)) for step in range(50)]
    problems = {at: ProblemRow(at, f"question {at} " + "x" * 2000, "a") for at in range(60)}
    found = outcomes(rows, problems)
    assert found is not None
    listed = found.listed("never")
    assert [one.id for one in listed] == list(range(49, 49 - MAX_LISTED, -1))
    assert (listed[0].groups, listed[0].last_step, found.total) == (50, 49, 60)
    assert (
        listed[0].prompt.startswith("question 49") and listed[0].prompt.endswith(" …") and len(listed[0].prompt) < 700
    )
