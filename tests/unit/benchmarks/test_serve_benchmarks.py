"""What the benchmarks of `rlsys serve` send."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from benchmarks import serve_calls as calls
from benchmarks.serve_http import supervised
from rlsys import losses, types
from rlsys.datums import collate
from rlsys.serve.wire import passes


@dataclass
class Sequence:
    tokens: list[int]
    logprobs: list[float] = field(default_factory=lambda: [-1.0] * calls.MAX_TOKENS)


def test_the_protobuf_body_holds_the_batch_of_the_sdk() -> None:
    message = supervised("model")
    message.seq_id = 1
    read = passes.read_protobuf(message.SerializeToString())
    sent = passes.prepare(read, vocab_size=calls.VOCABULARY, max_length=1024, max_datums=calls.DATUMS).batch
    loss = losses.resolve("cross_entropy", {})
    wanted = collate(calls.supervised(types), loss, vocab_size=calls.VOCABULARY, max_length=1024)
    assert len(sent.tokens) == calls.DATUMS * calls.LENGTH
    np.testing.assert_array_equal(sent.tokens, wanted.tokens)
    np.testing.assert_array_equal(sent.targets, wanted.targets)


def test_advantages_of_a_group_are_normalised_and_those_of_its_prompt_are_zero() -> None:
    even, odd = [2] * calls.MAX_TOKENS, [3] * calls.MAX_TOKENS
    half = calls.GROUP // 2
    data = calls.grouped(types, [([5, 7, 9], [Sequence(even)] * half + [Sequence(odd)] * half)])
    assert len(data) == calls.GROUP
    found = [np.asarray(each.loss_fn_inputs["advantages"]) for each in data]
    assert all((each[:2] == 0).all() for each in found)
    wanted = np.repeat([[1.0], [-1.0]], half, axis=0).repeat(calls.MAX_TOKENS, axis=1)
    np.testing.assert_allclose([each[2:] for each in found], wanted, atol=1e-4)


def test_a_completion_that_stopped_early_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="wanted 8 of 32"):
        calls.grouped(types, [([5], [Sequence([2, 2])] * calls.GROUP)])


def test_steps_have_different_prompts_and_both_sides_the_same() -> None:
    assert calls.prompts(1) == calls.prompts(1) != calls.prompts(2)
    assert calls.many_prompts(20) == (calls.prompts(1) + calls.prompts(2))[:20]
