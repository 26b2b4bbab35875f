"""Text of parts: vLLM's incremental detokenizer with the parameters of a request in parts, on real tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rlsys.answer_parts import PartsRequest
from rlsys.sampler.requests import BaseModel, completion_part, parts_params
from rlsys.types import SamplingParams
from tests.real.known import KNOWN, load, model_folder

SAID = "𓀀 Prost 🎉🏽 你好é! नमस्ते 👩‍👩‍👧 end. And then"


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    about: BaseModel


@pytest.fixture(scope="module", params=list(KNOWN))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name = str(request.param)
    load(name)  # skips the test without the tokenizer
    return Model(name, BaseModel(model_folder(name, tmp_path_factory.mktemp(name) / "model")))


def deltas(model: Model, text: str, **more: Any) -> list[str]:
    """Texts that come while a model writes `text`."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    tokenizer = load(model.name)
    asked = PartsRequest(np.array([5, 6], np.int32), 1, SamplingParams(max_tokens=999, seed=1), **more)
    params = parts_params(asked, 1, 1, model.about, scored=False)
    request = EngineCoreRequest("1", [5, 6], None, params, None, 0.0, None, None, None)
    detokenizer, found = IncrementalDetokenizer.from_new_request(tokenizer, request), list[str]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    for at, id_ in enumerate(ids):
        stopped = detokenizer.update([id_], False) is not None
        found.append(detokenizer.get_next_output_text(stopped or at == len(ids) - 1, True))
        if stopped:
            break
    return found


def test_no_part_holds_a_piece_of_a_character(model: Model) -> None:
    found = deltas(model, SAID)
    assert "".join(found) == SAID and not any("\ufffd" in text for text in found)
    assert "" in found, "some token is a piece of a character"


def test_no_part_holds_what_may_become_a_stop_string(model: Model) -> None:
    found = deltas(model, SAID, also_stop=("end. And now", "👩‍👧 e"))
    assert "".join(found) == SAID.partition("👩‍👧 e")[0]


def test_alternatives_of_outputs_that_vllm_has_merged_are_those_of_each() -> None:
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput

    def output(rows: list[tuple[list[int], list[float], int]]) -> CompletionOutput:
        found = FlatLogprobs()
        for ids, values, rank in rows:
            found.append_fast(ids, values, [rank, 1, 2], [None] * 3)
        return CompletionOutput(0, "", [ids[0] for ids, _, _ in rows], None, found)

    rows = [([7, 7, 8], [-1.0, -1.0, -2.0], 1), ([8, 7, 8], [-2.0, -1.0, -2.0], 2), ([9, 7, 8], [-3.0, -1.0, -2.0], 3)]
    merged = output(rows[:1])
    for row in rows[1:]:
        merged.logprobs.extend(output([row]).logprobs)
        merged.token_ids.extend(row[0][:1])
    for found in (completion_part(output(rows), 2), completion_part(merged, 2)):
        assert found.tokens.tolist() == [7, 8, 9] and found.logprobs.tolist() == [-1.0, -2.0, -3.0]
        assert found.topk_tokens.tolist() == [[7, 8]] * 3 and found.topk_logprobs.tolist() == [[-1.0, -2.0]] * 3
