import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.messages import Messages
from rlsys.data.problems import Epochs, Problem, encode
from rlsys.errors import ConfigError


def letters(prompts: Sequence[str | Messages]) -> list[list[int]]:
    assert all(isinstance(prompt, str) for prompt in prompts)
    return [[ord(character) for character in str(prompt)] for prompt in prompts]


WORDS = [Problem("ab", "1"), Problem("cde", "2"), Problem("f", "3"), Problem("ghij", "4")]


def test_encoded_prompts_lie_end_to_end() -> None:
    problems = encode(WORDS, letters)
    assert len(problems) == 4 and problems.answers == ("1", "2", "3", "4")
    assert problems.prompt_tokens.dtype == np.int32 and problems.prompt_offsets.dtype == np.int64
    assert problems.prompt_tokens.tolist() == letters(["abcdefghij"])[0]
    assert problems.prompt_offsets.tolist() == [0, 2, 5, 6, 10]


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=8))
def test_select_gives_the_asked_prompts_in_the_asked_order(ids: list[int]) -> None:
    tokens, offsets = encode(WORDS, letters).select(np.array(ids, np.int64))
    prompts = [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert prompts == letters([WORDS[i].prompt for i in ids])
    assert tokens.dtype == np.int32 and offsets.dtype == np.int64


def test_a_prompt_without_tokens_is_refused_by_number() -> None:
    with pytest.raises(ConfigError, match="problem 1: prompt '' has no token"):
        encode([Problem("a", "1"), Problem("", "2")], letters)


def test_longer_prompts_are_dropped_and_counted_and_ids_stay_dense() -> None:
    problems = encode(WORDS, letters, max_tokens=2)
    assert (problems.prompts, problems.answers, problems.dropped) == (("ab", "f"), ("1", "3"), 2)
    assert problems.select([1])[0].tolist() == letters(["f"])[0]
    assert encode(WORDS, letters, max_tokens=4).dropped == 0 == encode(WORDS, letters).dropped


def test_a_filter_that_leaves_nothing_is_refused_with_the_shortest() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.max_tokens: found 1; wanted at least 2, the shortest of 2 prompts"):
        encode(WORDS[:2], letters, max_tokens=1)


def test_the_digest_is_of_texts_answers_and_tokens_in_their_order() -> None:
    digest = encode(WORDS, letters).digest
    assert digest == encode(list(WORDS), letters).digest
    others = [
        encode(WORDS[::-1], letters),
        encode(WORDS[:3], letters),
        encode([Problem("ab", "9"), *WORDS[1:]], letters),
        encode([Problem("ba", "1"), *WORDS[1:]], letters),
        encode(WORDS, lambda prompts: [[*row, 0] for row in letters(prompts)]),
        encode([Problem("a", "b1"), *WORDS[1:]], letters),
    ]
    assert len({digest, *(other.digest for other in others)}) == 7


def test_a_set_without_problems_is_refused() -> None:
    with pytest.raises(ConfigError, match="no problems"):
        encode([], letters)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
def test_each_epoch_meets_every_problem_once(num_problems: int, batch: int, seed: int) -> None:
    order = Epochs(num_problems, batch, seed)
    ids = np.concatenate([order.batch_at(step) for step in range(3 * num_problems)])
    for epoch in range(3 * batch):
        assert sorted(ids[epoch * num_problems : (epoch + 1) * num_problems]) == list(range(num_problems))


@given(st.integers(1, 20), st.integers(1, 30))
def test_any_step_can_be_asked_for_alone(num_problems: int, batch: int) -> None:
    in_order = itertools.islice(Epochs(num_problems, batch, seed=1), 12)
    alone = Epochs(num_problems, batch, seed=1)
    for step, ids in reversed(list(enumerate(in_order))):
        np.testing.assert_array_equal(alone.batch_at(step), ids)
        assert len(ids) == batch and ids.dtype == np.int64


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    order = Epochs(50, 50, seed=0)
    assert not np.array_equal(order.batch_at(0), order.batch_at(1))
    assert not np.array_equal(order.batch_at(0), Epochs(50, 50, seed=1).batch_at(0))


def test_no_problems_to_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 problems"):
        Epochs(0, 4, seed=0)
