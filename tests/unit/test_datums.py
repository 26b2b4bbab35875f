"""Datums become one batch, and what is wrong is said before anything is applied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.datums import DatumBatch, collate, concatenate, learned_rows, shift, take
from rlsys.errors import DatumError, MissingInputError
from rlsys.losses import resolve
from rlsys.rollouts import ENVIRONMENT, Rollouts, offsets_of
from rlsys.types import Datum, ModelInput, TensorData


def datum(tokens=(1, 2, 3), **inputs):
    return Datum(ModelInput.from_ints(list(tokens)), inputs)


def rl_datum(**inputs):
    return datum(**{"target_tokens": [2, 3, 4], "logprobs": [0.0, -1.0, -2.0], "advantages": [0.0, 0.5, 0.5], **inputs})


def submit(*data, loss="ppo", vocab_size=10, max_length=8):
    return collate(data, resolve(loss), vocab_size=vocab_size, max_length=max_length)


def rollouts(prompts, groups) -> Rollouts:
    """``groups``: for each prompt its completions, token lists; log-probabilities count down from -1."""
    completions = [completion for group in groups for completion in group]
    T = sum(map(len, completions))
    return Rollouts(
        problems=np.arange(len(prompts)),
        prompt_tokens=np.array([token for prompt in prompts for token in prompt], np.int32),
        prompt_offsets=offsets_of([len(prompt) for prompt in prompts]),
        group=np.repeat(np.arange(len(prompts)), [len(group) for group in groups]).astype(np.int32),
        tokens=np.array([token for completion in completions for token in completion], np.int32),
        logprobs=-np.arange(1, T + 1, dtype=np.float32),
        versions=np.zeros(T, np.int32),
        offsets=offsets_of([len(completion) for completion in completions]),
        stop_reasons=np.zeros(len(completions), np.int8),
    )


def test_collate_lays_datums_end_to_end():
    short = datum([7], target_tokens=[8], logprobs=[-3.0], advantages=[2.0])
    batch = submit(rl_datum(), rl_datum(weights=[0, 1, 1], mask=[0, 1, 1]), short)
    assert batch.tokens.tolist() == [1, 2, 3, 1, 2, 3, 7]
    assert batch.targets.tolist() == [2, 3, 4, 2, 3, 4, 8]
    assert batch.offsets.tolist() == [0, 3, 6, 7]
    assert batch.columns["weights"].tolist() == [1, 1, 1, 0, 1, 1, 1]
    assert batch.columns["logprobs"].tolist() == [0, -1, -2, 0, -1, -2, -3]
    assert batch.columns["advantages"].tolist() == [0, 0.5, 0.5, 0, 0.5, 0.5, 2]
    assert set(batch.columns) == {"weights", "logprobs", "advantages"}
    assert batch.tokens.dtype == batch.targets.dtype == np.int32
    assert {column.dtype for column in batch.columns.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("container", [list, np.array, torch.tensor, TensorData])
def test_every_container_collates_to_the_same(container):
    made = {"target_tokens": [2, 3, 4], "logprobs": [0.0, -1.0, -2.0], "advantages": [0.0, 0.5, 0.5]}
    batch = submit(datum(**{key: container(value) for key, value in made.items()}))
    assert batch.targets.tolist() == made["target_tokens"]
    assert {key: batch.columns[key].tolist() for key in ("logprobs", "advantages")} == {
        key: made[key] for key in ("logprobs", "advantages")
    }


@pytest.mark.parametrize("advantages", [0.25, [0.25], np.float64(0.25), torch.tensor(0.25), TensorData([0.25])])
def test_one_advantage_counts_for_the_whole_sequence(advantages):
    assert submit(rl_datum(advantages=advantages)).columns["advantages"].tolist() == [0.25, 0.25, 0.25]


def test_the_weight_of_the_first_token_is_dropped():
    batch = submit(datum(target_tokens=[2, 3, 4], weights=[9, 0, 1, 2]), loss="cross_entropy")
    assert batch.columns["weights"].tolist() == [0, 1, 2]
    assert set(batch.columns) == {"weights"}


def test_behavior_logprobs_are_logprobs():
    inputs = {"target_tokens": [2, 3, 4], "behavior_logprobs": [0.0, -1.0, -2.0], "advantages": 1.0}
    assert submit(datum(**inputs)).columns["logprobs"].tolist() == [0, -1, -2]
    with pytest.raises(DatumError, match="found both 'logprobs' and 'behavior_logprobs'"):
        submit(datum(**inputs, logprobs=[0.0, -1.0, -2.0]))


def test_the_mask_is_ignored_and_the_weights_count():
    bare, masked = submit(rl_datum()), submit(rl_datum(mask=[0, 0, 0]))
    assert masked.columns["weights"].tolist() == bare.columns["weights"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
@pytest.mark.parametrize("key", ["target_tokens", "logprobs", "advantages"])
def test_a_missing_input_is_a_key_error_with_datum_key_found_and_wanted(loss, key):
    whole = rl_datum()
    inputs = {name: value for name, value in whole.loss_fn_inputs.items() if name != key}
    with pytest.raises(KeyError) as raised:
        submit(whole, datum(**inputs, mask=[1, 1, 1]), loss=loss)
    assert isinstance(raised.value, MissingInputError)
    for part in ("datum 1", f"loss_fn_inputs['{key}'] is missing", str(sorted([*inputs, "mask"])), repr(loss)):
        assert part in str(raised.value)


def test_cross_entropy_requires_weights():
    with pytest.raises(MissingInputError, match=r"datum 0: loss_fn_inputs\['weights'\] is missing"):
        submit(datum(target_tokens=[2, 3, 4]), loss="cross_entropy")


def test_target_logprobs_instead_of_logprobs_is_a_key_error():
    with pytest.raises(KeyError, match=r"'logprobs'.* is missing; found .*'target_logprobs'"):
        submit(datum(target_tokens=[2, 3, 4], target_logprobs=[0.0, -1.0, -2.0], advantages=1.0))


def changed_after_construction():
    weights = np.ones(3)
    made = rl_datum(weights=weights)
    weights[1] = np.nan
    return made


def shortened_after_construction():
    logprobs = [0.0, -1.0, -2.0]
    made = rl_datum(logprobs=logprobs)
    del logprobs[0]
    return made


WRONG = {
    "key of nobody": (rl_datum(temperature=[1, 1, 1]), r"wanted only \['advantages', 'clip_high_threshold', 'clip_low"),
    "key misspelt": (rl_datum(logprob=[0, 0, 0]), r"datum 1: .*'logprob'.* is not an input of 'ppo'.* 'logprobs'\?"),
    "weight": (rl_datum(weight=[0, 0, 0]), r"did you mean 'weights'\?"),
    "id too high": (
        rl_datum(target_tokens=[2, 3, 10]),
        "datum 1: .*'target_tokens'.*: found 10 at position 2; wanted ids",
    ),
    "ignore index": (rl_datum(target_tokens=[-100, 3, 4]), "found -100 at position 0; wanted ids from 0 to 9"),
    "beyond int32": (rl_datum(target_tokens=[2, 3, 2**40]), "found 1099511627776 at position 2"),
    "beyond float32": (rl_datum(advantages=[0.0, 1e300, 0.0]), "datum 1: .*'advantages'.*: found inf at position 1"),
    "input id": (datum([1, 2, 11], **rl_datum().loss_fn_inputs), "datum 1: model_input: found 11 at position 2"),
    "too long": (
        datum(range(9), target_tokens=list(range(9)), logprobs=np.zeros(9), advantages=1.0),
        "datum 1: model_input: found 9 tokens; wanted at most 8",
    ),
    "changed": (changed_after_construction(), "datum 1: .*'weights'.*: found nan at position 1"),
    "shortened": (shortened_after_construction(), r"datum 1: .*'logprobs'.*: found shape \(2,\); wanted \(3,\)"),
    "no datum": ({"target_tokens": [1]}, "datum 1: found a dict; wanted a Datum"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_datum_is_refused_on_submission(wrong, message):
    with pytest.raises(DatumError, match=message):
        submit(rl_datum(), wrong)


def test_no_datums_are_refused():
    with pytest.raises(DatumError, match="found no datums; wanted at least one"):
        submit()


def test_filled_in_logprobs_pass_where_they_do_not_count():
    submit(rl_datum(logprobs=[0.0, 1e-5, -1.0]))  # rounding of a sampler
    submit(rl_datum(logprobs=[99.0, -1.0, -1.0], weights=[0, 1, 1]))


def test_shift_draws_the_picture():
    made = rollouts([[1, 2]], [[[3, 4]]])
    batch = shift(made, np.array([0.5, 0.25], np.float32), None)
    assert batch.tokens.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [2, 3, 4]
    assert batch.columns["weights"].tolist() == [0, 1, 1]
    assert batch.columns["logprobs"].tolist() == [0, -1, -2]
    assert batch.columns["advantages"].tolist() == [0, 0.5, 0.25]
    assert batch.tokens.dtype == batch.targets.dtype == np.int32
    assert batch.offsets.dtype == np.int64
    assert {column.dtype for column in batch.columns.values()} == {np.dtype(np.float32)}


def test_a_reply_within_a_completion_is_read_and_predicted_and_counts_for_nothing():
    made = rollouts([[1, 2]], [[[3, 7, 8, 4]]])
    made.versions[1:3] = ENVIRONMENT
    batch = shift(made, np.array([0.5, 9, 9, 0.25], np.float32))
    assert batch.tokens.tolist() == [1, 2, 3, 7, 8]
    assert batch.targets.tolist() == [2, 3, 7, 8, 4]
    assert batch.columns["weights"].tolist() == [0, 1, 0, 0, 1]
    assert batch.columns["logprobs"].tolist() == [0, -1, 0, 0, -4]
    assert batch.columns["advantages"].tolist() == [0, 0.5, 0, 0, 0.25]


def test_a_completion_in_which_no_token_is_a_models_makes_no_datum():
    made = rollouts([[1, 2]], [[[3], [4, 5], []]])
    made.versions[1:] = ENVIRONMENT
    assert learned_rows(made).tolist() == [0]
    assert shift(made, np.zeros(3, np.float32)).num_datums == 1


def slowly(made, advantages, keep) -> list[tuple[Any, ...]]:
    """One completion after the other, as one would on paper."""
    datums = []
    for r in range(len(made.group)):
        prompt, completion = made.prompt(made.group[r]).tolist(), made.completion(r).tolist()
        if not keep[r] or not completion:
            continue
        span = slice(made.offsets[r], made.offsets[r + 1])
        whole, blank = prompt + completion, [0.0] * (len(prompt) - 1)
        datums.append(
            (
                whole[:-1],
                whole[1:],
                blank + [1.0] * len(completion),
                blank + made.logprobs[span].tolist(),
                blank + advantages[span].tolist(),
            )
        )
    return datums


def parts(batch: DatumBatch) -> list[tuple[Any, ...]]:
    rows = (batch.tokens, batch.targets, *(batch.columns[key] for key in ("weights", "logprobs", "advantages")))
    spans = [slice(a, b) for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    return [tuple(row[span].tolist() for row in rows) for span in spans]


token = st.integers(0, 99)
prompt = st.lists(token, min_size=1, max_size=4)
group = st.lists(st.lists(token, max_size=5), min_size=1, max_size=4)


@given(data=st.lists(st.tuples(prompt, group), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_shift_equals_the_slow_way(data, seed):
    made = rollouts([prompt for prompt, _ in data], [group for _, group in data])
    rng = np.random.default_rng(seed)
    advantages = rng.normal(size=len(made.tokens)).astype(np.float32)
    keep = rng.random(len(made.group)) < 0.7
    assert parts(shift(made, advantages, keep)) == slowly(made, advantages, keep)


def test_a_batch_without_datums_is_valid():
    made = rollouts([[1, 2]], [[[3, 4], [5]]])
    batch = shift(made, np.zeros(3, np.float32), np.zeros(2, bool))
    assert (batch.num_datums, len(batch.tokens), batch.offsets.tolist()) == (0, 0, [0])
    assert batch.lengths.tolist() == []
    assert take(batch, []).num_datums == 0
    assert concatenate([batch, batch]).num_datums == 0


def test_an_empty_prompt_has_nothing_to_predict_from():
    with pytest.raises(DatumError, match="the prompt of completion 1 is empty"):
        shift(rollouts([[1], []], [[[3]], [[4]]]), np.zeros(2, np.float32), None)


def test_take_and_concatenate_undo_each_other():
    made = rollouts([[1, 2], [3]], [[[4, 5], [6]], [[7, 8, 9]]])
    batch = shift(made, np.arange(6, dtype=np.float32), None)
    whole = parts(batch)
    assert parts(concatenate([take(batch, [0]), take(batch, [1, 2])])) == whole
    assert parts(take(batch, [2, 0])) == [whole[2], whole[0]]
    assert parts(take(batch, np.array([True, False, True]))) == [whole[0], whole[2]]
