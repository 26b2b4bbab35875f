"""Claims about which problems are one problem, and about keeping held-out ones apart."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.dedup import count_repeated, find_shared, is_held_out, normalise, refuse_shared
from rlsys.errors import ConfigError


@pytest.mark.parametrize(
    "other",
    [
        "how MANY apples?",
        "  How  many\n\tapples? ",
        "How many apples",
        "\u201cHow many apples?\u201d",
        "How many apples.",
        "\uff28\uff4f\uff57 many \uff41\uff50\uff50\uff4c\uff45\uff53\uff1f",
    ],
)
def test_writing_it_otherwise_does_not_make_another_problem(other: str) -> None:
    assert normalise(other) == normalise("How many apples?")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 5?", "What is 5!"),
        ("5 + 1", "-5 + 1"),
        (".5 + 1", "5 + 1"),
        ("1 + 1", "1 + 2"),
        ("$x$", "$y$"),
        ("?", ";"),
    ],
)
def test_numbers_and_signs_make_another_problem(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


@given(st.text(alphabet=string.printable))
def test_what_is_normal_stays_as_it_is(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text) or not text.strip()


def test_shared_problems_are_found_with_both_places() -> None:
    assert find_shared(["a", "b", "C?", "b"], ["x", "c", "B", "b"]) == {1: 2, 2: 1, 3: 2}
    assert find_shared(["a"], ["b"]) == {}


def test_a_held_out_problem_that_is_trained_on_is_refused_with_an_example() -> None:
    with pytest.raises(
        ConfigError, match=r"2 of 3 held-out .* training problem 1 'b', held-out problem 2 'B\.'.*task\.eval"
    ):
        refuse_shared(["a", "b", "c"], ["c", "x", "B."])
    refuse_shared(["a", "b"], ["c"])


def test_repeats_are_counted_beyond_the_first() -> None:
    assert count_repeated(["a", "A", "b", "a."]) == 2


def test_the_part_that_is_kept_apart_is_of_the_asked_size_and_holds_repeats_together() -> None:
    prompts = [f"What is {i} + {i}?" for i in range(4000)]
    apart = [prompt for prompt in prompts if is_held_out(prompt, 0.1)]
    assert 330 < len(apart) < 470
    assert all(is_held_out(prompt.upper(), 0.1) == is_held_out(prompt, 0.1) for prompt in prompts)
    assert {p for p in prompts if is_held_out(p, 0.05)} < set(apart)
