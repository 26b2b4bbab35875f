"""The nouns: what they hold, and how they say no."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.errors import ConfigError, DatumError, MissingInputError, RlsysError, SamplingError
from rlsys.types import AdamParams, Datum, EncodedTextChunk, ModelInput, SamplingParams, TensorData, to_array


def test_model_input_round_trips_from_every_container():
    containers: list[Any] = [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.int32), torch.tensor([1, 2, 3])]
    for tokens in containers:
        assert ModelInput.from_ints(tokens).to_ints() == [1, 2, 3]
    assert ModelInput.from_ints([1, 2]).length == 2
    assert ModelInput.empty().length == 0
    assert ModelInput.from_ints([1]).append_int(2).append(EncodedTextChunk([3, 4])).to_ints() == [1, 2, 3, 4]
    assert ModelInput([EncodedTextChunk([1]), EncodedTextChunk([2, 3])]) == ModelInput.from_ints([1, 2, 3])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], r"found shape \(1, 2\)"),
        ([1.0, 2.0], "found dtype float64; wanted integer token ids"),
        ([True, False], "found dtype bool"),
        ([-1, 2], "found ids from -1 to 2"),
        ([2**31], "wanted 0 to 2147483647"),
        (["a"], "wanted integer token ids"),
        ([[1], [2, 3]], "ragged"),
    ],
)
def test_wrong_token_ids_are_refused(tokens, message):
    with pytest.raises(DatumError, match=message):
        ModelInput.from_ints(tokens)


def test_tensor_data_behaves_like_the_sequence_it_holds():
    tensor = TensorData(data=[1.0, 2.0, 3.0, 4.0], dtype="float32", shape=[2, 2])
    assert (tensor.dtype, tensor.shape, tensor.data) == ("float32", [2, 2], [1.0, 2.0, 3.0, 4.0])
    assert tensor.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert len(tensor) == 2
    flat = TensorData([5, 6, 7])
    assert flat.dtype == "int64"
    assert (flat[1], list(flat), flat[1:]) == (6, [5, 6, 7], TensorData([6, 7]))
    assert np.asarray(flat).tolist() == [5, 6, 7]
    assert torch.equal(TensorData.from_torch(torch.tensor([1.5, 2.5])).to_torch(), torch.tensor([1.5, 2.5]))
    assert TensorData.from_torch(torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True)).data == [1.5]
    assert TensorData.from_numpy(np.array([1.5])).to_numpy().dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], "float16"), "unknown dtype 'float16'; wanted 'float32' or 'int64'"),
        ((["a"],), "wanted numbers"),
        (([None],), "wanted numbers"),
        (([1.5], "int64"), "fractional"),
        (([float("inf")], "int64"), "infinite"),
        (([float("nan")], "int64"), "fractional"),
        (([1e30], "int64"), "too large"),
        ((np.array([2**63], np.uint64),), "too large"),
        (([0.5, -1e300],), "found 1e[+]300, which float32 cannot hold"),
        (([1, 2, 3], "int64", [2, 2]), r"found 3 values for shape \[2, 2\]"),
        (([[1], [1, 2]],), "ragged"),
    ],
)
def test_a_wrong_tensor_is_refused(arguments, message):
    with pytest.raises(DatumError, match=message):
        TensorData(*arguments)


def test_to_array_takes_every_container():
    for value in (
        [1.0, 2.0],
        np.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0], requires_grad=True),
        TensorData([1.0, 2.0]),
    ):
        assert to_array(value).tolist() == [1.0, 2.0]


def datum(**inputs):
    return Datum(ModelInput.from_ints([4, 5, 6]), {"target_tokens": [5, 6, 7], **inputs})


@pytest.mark.parametrize(
    "inputs",
    [
        {"weights": [0, 1, 1]},
        {"weights": torch.ones(3)},
        {"weights": [0, 0, 1, 1]},  # one per token of prompt and completion
        {"weights": TensorData([0.0, 1.0, 1.0])},
        {"mask": [True, False, True]},
        {"advantages": 0.5},
        {"advantages": [0.5]},
        {"advantages": np.float32(0.5)},
        {"advantages": torch.tensor(0.5)},
        {"advantages": [0.5, 0.5, 0.5], "logprobs": [-1.0, -2.0, -3.0]},
    ],
)
def test_a_datum_takes_every_container_and_keeps_it(inputs):
    made = datum(**inputs)
    assert all(made.loss_fn_inputs[key] is value for key, value in inputs.items())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"logprobs": [-1.0, -2.0]}, r"\['logprobs'\]: found shape \(2,\); wanted \(3,\)"),
        ({"logprobs": [[-1.0], [-2.0], [-3.0]]}, r"found shape \(3, 1\); wanted \(3,\)"),
        ({"logprobs": -1.0}, r"found shape \(\); wanted \(3,\)"),
        ({"logprobs": [-1.0, float("nan"), 0.0]}, r"\['logprobs'\]: found nan at position 1; wanted finite values"),
        ({"logprobs": [-1.0, 0.0, -float("inf")]}, "found -inf at position 2"),
        ({"logprobs": ["a", "b", "c"]}, "wanted numbers"),
        ({"logprobs": [None, -1.0, -1.0]}, "wanted numbers"),
        ({"logprobs": [[-1.0], [-1.0, -2.0], [0.0]]}, "ragged"),
        ({"advantages": [1.0, 1.0]}, r"\['advantages'\]: found shape \(2,\)"),
        ({"advantages": float("nan")}, "found nan at position 0"),
        ({"weights": [1, 1, 1, 1, 1]}, r"\['weights'\]: found shape \(5,\)"),
        ({"mask": [1, 1]}, r"\['mask'\]: found shape \(2,\)"),
        ({"target_tokens": [5.0, 6.0, 7.0]}, "found dtype float64; wanted integer token ids"),
        ({"target_tokens": [[5, 6], [6, 7], [7, 8]]}, r"\['target_tokens'\]: found shape \(3, 2\); wanted \(3,\)"),
    ],
)
def test_a_wrong_datum_is_refused_on_construction(inputs, message):
    with pytest.raises(DatumError, match=message):
        datum(**inputs)


def test_a_datum_needs_a_model_input_with_tokens():
    with pytest.raises(DatumError, match=r"model_input is a list; wanted ModelInput\.from_ints"):
        Datum([1, 2], {})  # type: ignore[arg-type]
    with pytest.raises(DatumError, match="model_input is empty"):
        Datum(ModelInput.empty(), {})
    with pytest.raises(DatumError, match="loss_fn_inputs is a list; wanted a dict"):
        Datum(ModelInput.from_ints([1]), [("weights", [1.0])])  # type: ignore[arg-type]


def test_adam_params_have_the_defaults_of_the_contract():
    params = AdamParams()
    assert (params.learning_rate, params.beta1, params.beta2, params.eps) == (1e-4, 0.9, 0.95, 1e-12)
    assert (params.weight_decay, params.grad_clip_norm) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("beta2", float("nan")),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("grad_clip_norm", -1.0),
        ("grad_clip_norm", float("inf")),
        ("grad_clip_norm", None),
        ("learning_rate", "1e-4"),
    ],
)
def test_wrong_adam_params_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"AdamParams.{name}: found {value!r}"):
        AdamParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", 0),
        ("top_k", -2),
        ("top_k", 2.5),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("seed", 1.5),
        ("stop", 5),
        ("stop", [1.5]),
        ("stop", [1, "a"]),
    ],
)
def test_wrong_sampling_params_are_refused(name, value):
    with pytest.raises(SamplingError, match=rf"SamplingParams.{name}: found {re.escape(repr(value))}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("stop", [None, [], "END", ["END", "\n"], [1, np.int64(2)], (3,)])
def test_a_completion_ends_at_strings_or_at_token_ids(stop):
    assert SamplingParams(stop=stop).stop is stop


def test_sampling_params_draw_from_the_whole_distribution_by_default():
    params = SamplingParams(max_tokens=np.int64(5))  # type: ignore[arg-type]
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.stop) == (1.0, 1.0, -1, None, None)


def test_a_missing_input_is_a_key_error_whose_message_stays_readable():
    error = MissingInputError("datum 3: 'logprobs' is missing")
    assert isinstance(error, KeyError)
    assert isinstance(error, DatumError)
    assert isinstance(error, RlsysError)
    assert str(error) == "datum 3: 'logprobs' is missing"
