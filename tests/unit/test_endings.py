"""Claims about which tokens end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_rendering import CHATML, END, tokenizer_of

from rlsys.endings import endings_of, endings_of_tokenizer
from rlsys.engine.requests import BaseModel, engine_params, stop_rules
from rlsys.errors import ConfigError, SamplingError
from rlsys.types import SamplingParams

START, SEP = 258, 259  # ids of <|im_start|> and <|sep|>
ROWS = 300
# The last message ends in another token than those of the history, as gpt-oss has it.
RETURNING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{{ '<|sep|>' if loop.last and not add_generation_prompt else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def folder_of(
    at: Path,
    config: Any = None,
    generation: Any = None,
    eos: str | None = "<|im_end|>",
    template: str | None = CHATML,
    tokenizer: bool = True,
) -> Path:
    at.mkdir()
    for name, ends in (("config.json", config), ("generation_config.json", generation)):
        fields = {"vocab_size": ROWS, "max_position_embeddings": 64} if name == "config.json" else {}
        (at / name).write_text(json.dumps(fields if ends is None else {**fields, "eos_token_id": ends}))
    if tokenizer:
        made = tokenizer_of(template)
        made.eos_token = eos
        made.save_pretrained(at)
    return at


@pytest.mark.parametrize(
    ("places", "ids", "noted"),
    [
        ({"config": END, "generation": END}, {END}, False),
        ({"config": [END, SEP]}, {END, SEP}, False),
        ({"config": END, "generation": [SEP, END]}, {END, SEP}, False),
        ({"config": SEP}, {SEP, END}, True),  # a base's config beside a chat tokenizer
        ({}, {END}, True),  # a config that names none
        ({"config": SEP, "eos": "<|sep|>"}, {SEP, END}, True),  # only the chat template ends a turn
        ({"config": SEP, "eos": "<|sep|>", "template": None}, {SEP}, False),
        ({"config": END, "template": RETURNING}, {END, SEP}, True),
        ({"config": END, "tokenizer": False}, {END}, False),
        ({"tokenizer": False}, set(), False),
    ],
)
def test_every_place_that_names_an_end_counts(
    tmp_path: Path, places: dict[str, Any], ids: set[int], noted: bool
) -> None:
    found = endings_of(folder_of(tmp_path / "model", **places))
    assert set(found.ids) == ids and len(found.ids) == len(ids)
    assert bool(found.notes) == noted, found.notes


def test_a_disagreement_is_told_with_tokens_and_places(tmp_path: Path) -> None:
    (note,) = endings_of(folder_of(tmp_path / "model", config=SEP)).notes
    assert "completions end with <|im_end|> (257) of the tokenizer and the chat template too" in note
    assert "its configuration names <|sep|> (259)" in note


def test_an_end_that_the_tokenizer_takes_for_a_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config\.json: eos_token_id 33 is '.' in the tokenizer.*<\|im_end\|>' \(257\)"
    ):
        endings_of(folder_of(tmp_path / "model", config=33))


def test_an_end_beyond_the_embedding_ends_nothing_and_is_told(tmp_path: Path) -> None:
    found = endings_of(folder_of(tmp_path / "model", config=[END, ROWS]))
    assert found.ids == (END,)
    assert "the end token 300 lies beyond the embedding" in found.notes[0]


def test_a_base_that_is_made_ends_with_its_tokenizers_end() -> None:
    assert endings_of_tokenizer(tokenizer_of(None)).ids == (END,)


@pytest.mark.parametrize(
    ("stop", "also", "texts", "ids"),
    [
        (None, (), [], [END]),
        ([], (), [], []),
        ([7, 8], (), [], [7, 8]),
        ("x;", (), ["x;"], [END]),
        (["x;", "y"], (), ["x;", "y"], [END]),
        (["<|im_end|>"], (), [], [END]),
        (["<|sep|>", "x;"], (), ["x;"], [END, SEP]),
        (None, ("x;", "<|sep|>"), ["x;"], [END, SEP]),
        ([7], ("x;",), ["x;"], [7]),
        (["x;"], ("y",), ["x;", "y"], [END]),
    ],
)
def test_stop_strings_add_to_the_ends_and_ids_replace_them(
    tmp_path: Path, stop: Any, also: tuple[str, ...], texts: list[str], ids: list[int]
) -> None:
    model = BaseModel(folder_of(tmp_path / "model", config=END))
    assert stop_rules(stop, model, also) == (texts, ids)
    made = engine_params(SamplingParams(max_tokens=4, stop=stop), 1, 0, model, also)
    assert (made.stop, made.stop_token_ids, made.ignore_eos) == (texts, ids, True)


def test_a_stop_string_that_no_text_can_show_is_refused(tmp_path: Path) -> None:
    model = BaseModel(folder_of(tmp_path / "model", config=END))
    with pytest.raises(
        SamplingError, match=r"stop: found '<\|im_end\|>\\n'; the special token '<\|im_end\|>' is no text"
    ):
        stop_rules(["<|im_end|>\n"], model)
